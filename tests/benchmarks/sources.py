"""Sources of any size from few files: folders in Kaggle's layout whose images are links."""

import csv
import json
import os
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

from pneumo.dataset.phantoms.source_folder import write_phantoms

FINDINGS = ("Lung Opacity", "Normal", "No Lung Opacity / Not Normal")
_LINKS = 20_000
"""Links that one file may have on common file systems are a few times more."""


def write_linked_source(
    folder: Path, files: Sequence[Path], *, num_studies: int, images_per_patient: int = 2
) -> Path:
    """A source of `num_studies`, whose images are hard links to `files` in turn.

    Every third study is positive; the hash key is fixed, so equal calls give equal stores.
    """
    rng = random.Random(num_studies)
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(num_studies)]
    images = folder / "stage_2_train_images"
    images.mkdir(parents=True)
    originals = list(files)
    for i, image_id in enumerate(ids):
        k = i % len(originals)
        if i >= len(originals) and (i // len(originals)) % _LINKS == 0:
            copy = folder / f".copy-{i}"
            copy.write_bytes(originals[k].read_bytes())
            originals[k] = copy
        os.link(originals[k], images / f"{image_id}.dcm")
    with (folder / "stage_2_train_labels.csv").open("w", newline="") as file:
        labels = csv.writer(file)
        labels.writerow(["patientId", "x", "y", "width", "height", "Target"])
        for i, image_id in enumerate(ids):
            labels.writerow([image_id, *(("", "", "", "", 0) if i % 3 else (9, 9, 5, 5, 1))])
    with (folder / "stage_2_detailed_class_info.csv").open("w", newline="") as file:
        classes = csv.writer(file)
        classes.writerow(["patientId", "class"])
        classes.writerows([image_id, FINDINGS[i % 3]] for i, image_id in enumerate(ids))
    mapping = [
        {"subset_img_id": image_id, "img_id": f"{i // images_per_patient:08d}_{i:06d}.png"}
        for i, image_id in enumerate(ids)
    ]
    name = "pneumonia-challenge-dataset-mappings_2018.json"
    (folder / name).write_text(json.dumps(mapping))
    (folder / ".pneumo").mkdir(mode=0o700)
    (folder / ".pneumo" / "hash_key").write_text("the same store every time")
    (folder / ".pneumo" / "hash_key").chmod(0o600)
    return folder


def find_real_data(name: str) -> Path | None:
    """A folder of the research data beside the checkout, which is no part of it; None without."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / name
    return folder if folder.is_dir() else None


def list_images(phantoms: Path) -> list[Path]:
    """Real DICOM files where there are any, else phantoms, written there."""
    real = find_real_data("rsna-mini")
    if real is None:
        print("no research data at hand: phantoms")
        write_phantoms(phantoms, num_studies=100, seed=0)
        return sorted((phantoms / "stage_2_train_images").iterdir())
    phantoms.mkdir(parents=True)
    for path in (real / "stage_2_train_images").iterdir():
        (phantoms / path.name).write_bytes(path.read_bytes())
    return sorted(phantoms.iterdir())
