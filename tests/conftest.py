"""Fixtures for several folders: real DICOM bytes, a folder in Kaggle's layout, a small store."""

import csv
import gzip
import hashlib
import io
import json
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import settings
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, SecondaryCaptureImageStorage

from pneumo.config import SplitConfig
from pneumo.dataset.manifest import Manifest, SplitEntry, write_manifest
from pneumo.dataset.shards import Sample, write_shard
from pneumo.dataset.splits import Interval, LeakageAudit
from pneumo.dataset.study_table import (
    StudyRow,
    digest_pixels,
    find_duplicates,
    tabulate_studies,
    write_quarantine,
    write_studies,
)
from pneumo.images.boxes import Box

DicomMaker = Callable[..., bytes]
FolderMaker = Callable[..., Path]
StoreMaker = Callable[..., str]

# Tests reach no cluster, settings or W&B account of whoever runs them.
LEFT_OUT = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_", "PNEUMO_", "WANDB_")
for variable in list(os.environ):
    if variable.startswith(LEFT_OUT) and not variable.startswith("PNEUMO_TEST_"):
        del os.environ[variable]

# No deadline, as machines are shared; the same examples each time.
settings.register_profile("few", deadline=None, max_examples=15, derandomize=True)
settings.register_profile("many", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("many" if "CI" in os.environ else "few")

NOBODY = 65534
FINDINGS = ("Lung Opacity", "Normal", "No Lung Opacity / Not Normal")


MARKERS = {"ray": {"ray_here", "ray_cluster", "scripted_cluster"}, "wandb": {"backend"}}
"""By marker the fixtures whose tests get it: those that start a Ray cluster, a backend of W&B."""
LONGEST_FILES = {"test_sending.py", "test_wandb_results.py", "test_notebook.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures. The longest files begin first: two files run at a time."""
    for item in items:
        for marker, fixtures in MARKERS.items():
            if isinstance(item, pytest.Function) and fixtures & set(item.fixturenames):
                item.add_marker(marker)
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data beside the checkout, which is no part of it; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the research data, and there is none at {folder}")
    return folder


@pytest.fixture
def folder_without_root(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for `without_root`; root's tmp_path is in a folder that is root's alone."""
    if os.geteuid():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextmanager
def without_root(folder: Path) -> Iterator[None]:
    """As the owner of `folder` and of all in it, who is not root: root may read what it likes."""
    user = os.geteuid()
    for path in (folder, *folder.rglob("*")) if user == 0 else ():
        os.lchown(path, NOBODY, -1)
    try:
        if user == 0:
            os.seteuid(NOBODY)
        if not os.access(folder, os.W_OK, effective_ids=True):
            pytest.skip(f"{folder} cannot be reached by user {NOBODY}")
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(scope="session")
def make_dicom() -> DicomMaker:
    """Encode pixels as a DICOM file with RSNA's header quirks; see `encode_dicom`."""
    return encode_dicom


@pytest.fixture
def kaggle_folder(tmp_path_factory: pytest.TempPathFactory) -> FolderMaker:
    """Write a folder in Kaggle's layout; see `_write_kaggle_folder`."""

    def make(**options: Any) -> Path:
        return _write_kaggle_folder(tmp_path_factory.mktemp("kaggle"), **options)

    return make


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> StoreMaker:
    """Write a whole store of noise with a faint signal; see `write_store`."""

    def make(**options: Any) -> str:
        return write_store(tmp_path_factory.mktemp("store"), **options)

    return make


def encode_dicom(
    pixels: npt.NDArray[Any],
    *,
    jpeg_quality: int | None = None,
    identifier: str = "00000000-0000-4000-8000-000000000000",
    elements: Mapping[str, Any] | None = None,
) -> bytes:
    """A Secondary Capture file of `pixels`, (H, W) of 8 or 16 bits, or (F, H, W).

    With `jpeg_quality` one JPEG-baseline frame, else uncompressed. `elements` are set by keyword;
    None deletes one.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[identifier])
    meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg_quality else ExplicitVRLittleEndian
    bits = pixels.dtype.itemsize * 8
    buffer = io.BytesIO()
    # A bare `62` is no valid Age String; RSNA's files have it all the same.
    with pydicom.config.disable_value_validation():
        dataset = FileDataset(buffer, {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID = meta.MediaStorageSOPClassUID
        dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        dataset.Modality = "CR"
        dataset.PatientName = dataset.PatientID = identifier
        dataset.PatientAge, dataset.PatientSex, dataset.ViewPosition = "62", "F", "PA"
        dataset.PixelSpacing = [0.143, 0.143]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = pixels.shape[-2:]
        dataset.BitsAllocated = dataset.BitsStored = bits
        dataset.HighBit = bits - 1
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        if pixels.ndim == 3:
            dataset.NumberOfFrames = len(pixels)
        if jpeg_quality:
            frame = io.BytesIO()
            Image.fromarray(pixels).save(frame, "JPEG", quality=jpeg_quality)
            dataset.PixelData = encapsulate([frame.getvalue()])
        else:
            dataset.PixelData = pixels.tobytes()
        for keyword, value in (elements or {}).items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _write_kaggle_folder(
    folder: Path,
    *,
    num_studies: int = 24,
    images_per_patient: int = 2,
    image_size: int = 64,
    seed: int = 0,
    stage: str = "stage_2_",
    compressed: bool = False,
    mapping: bool = True,
) -> Path:
    """`num_studies` images in `folder`: every third is positive, with one or two boxes.

    JPEG and uncompressed files take turns; a box is a bright rectangle. `stage` begins the names of
    tables and image folder, `compressed` makes the tables .gz.
    """
    rng = random.Random(f"kaggle/{seed}")
    images = folder / f"{stage}train_images"
    images.mkdir()
    labels: list[list[Any]] = [["patientId", "x", "y", "width", "height", "Target"]]
    classes: list[list[Any]] = [["patientId", "class"]]
    published = []
    for i in range(num_studies):
        image_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        finding = FINDINGS[i % 3]
        pixels = draw_chest(image_size)
        boxes = [_draw_box(rng, image_size) for _ in range(1 + i % 2)] if i % 3 == 0 else []
        for x, y, width, height in boxes:
            pixels[y : y + height, x : x + width] = 160
        labels += [[image_id, *(float(v) for v in box), 1] for box in boxes]
        labels += [] if boxes else [[image_id, "", "", "", "", 0]]
        classes += [[image_id, finding]] * max(len(boxes), 1)
        patient, number = divmod(i, images_per_patient)
        published.append(
            {"subset_img_id": image_id, "img_id": f"{patient + 100:08d}_{number:03d}.png"}
        )
        header = {"PatientAge": str(20 + i), "PatientSex": "FM"[i % 2], "ViewPosition": "AP"}
        data = encode_dicom(
            pixels, jpeg_quality=95 if i % 2 else None, identifier=image_id, elements=header
        )
        (images / f"{image_id}.dcm").write_bytes(data)
    _write_table(folder / f"{stage}train_labels.csv", labels, compressed)
    _write_table(folder / f"{stage}detailed_class_info.csv", classes, compressed)
    if mapping:
        path = folder / "pneumonia-challenge-dataset-mappings_2018.json"
        _write_text(path, json.dumps(published), compressed)
    return folder


def draw_chest(size: int) -> npt.NDArray[np.uint8]:
    """A picture (size, size) that `input_checks` accepts as a frontal chest, darker than 130."""
    y, x = np.mgrid[0:size, 0:size] / size
    lungs = sum(np.exp(-(((x - c) / 0.12) ** 2) - ((y - 0.45) / 0.25) ** 2) for c in (0.3, 0.7))
    air = sum(np.exp(-(((x - c) / 0.2) ** 2) - ((y - 0.05) / 0.2) ** 2) for c in (0, 1))
    return np.asarray(np.clip(90 + 36 * y - 55 * lungs - 72 * air, 0, 255), np.uint8)


def _draw_box(rng: random.Random, image_size: int) -> tuple[int, int, int, int]:
    width, height = (rng.randint(image_size // 8, image_size // 3) for _ in range(2))
    return rng.randrange(image_size - width), rng.randrange(image_size - height), width, height


def _write_table(path: Path, rows: list[list[Any]], compressed: bool) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    _write_text(path, text.getvalue(), compressed)


def _write_text(path: Path, text: str, compressed: bool) -> None:
    if compressed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


def write_store(
    folder: Path,
    *,
    train: int = 48,
    val: int = 12,
    test: int = 12,
    image_size: int = 32,
    samples_per_shard: int = 16,
    seed: int = 0,
) -> str:
    """A store in `folder`, two studies a patient, every third positive and brighter; its URL."""
    rng = np.random.default_rng(seed)
    store_url = str(folder)
    numbers = {"train": train, "val": val, "test": test}
    splits: dict[str, SplitEntry] = {}
    rows: list[StudyRow] = []
    for name, number in numbers.items():
        samples = [_draw_sample(i, image_size, rng) for i in range(number)]
        rows += [_describe_study(name, i, sample) for i, sample in enumerate(samples)]
        gray = np.stack([sample.pixels for sample in samples])
        if name == "train":
            mean, std = float(gray.mean() / 255), float(gray.std() / 255)
        entries = tuple(
            write_shard(
                store_url, f"{name}/{k:06d}.tar", samples[start : start + samples_per_shard]
            )
            for k, start in enumerate(range(0, number, samples_per_shard))
        )
        splits[name] = SplitEntry(
            samples=number,
            positives=sum(sample.target for sample in samples),
            patients=-(-number // 2),
            histogram=tuple(np.bincount(gray.ravel(), minlength=256).tolist()),
            shards=entries,
        )
    studies = tabulate_studies(rows)
    manifest = Manifest(
        source_digest="0" * 64,
        prepare_digest="1" * 64,
        image_size=image_size,
        seed=seed,
        split=SplitConfig(salt=0),
        audit=_audit(splits),
        mean=round(mean, 6),
        std=round(std, 6),
        quarantined={},
        contradictions={},
        unlabelled=0,
        duplicates=find_duplicates(studies, has_patients=True),
        studies=write_studies(store_url, studies),
        quarantine=write_quarantine(store_url, []),
        splits=splits,
    )
    write_manifest(store_url, manifest)
    return store_url


def _draw_sample(i: int, image_size: int, rng: np.random.Generator) -> Sample:
    target = int(i % 3 == 0)
    noise = rng.normal(100 + 30 * target, 30, (image_size, image_size))
    return Sample(rng.bytes(10).hex(), np.clip(noise, 0, 255).astype(np.uint8), target)


def _describe_study(split: str, i: int, sample: Sample) -> StudyRow:
    return StudyRow(
        key=sample.key,
        patient=f"{split}-{i // 2}",
        split=split,
        target=sample.target,
        finding=FINDINGS[i % 3],
        boxes=(Box(1.0, 2.0, 8.0, 9.5),) if sample.target else (),
        age=None if i % 5 == 0 else 20 + i % 60,
        sex=(None, "F", "M")[i % 3],
        view=("AP", "PA")[i % 2],
        spacing_mm=None if i % 4 == 0 else 0.143,
        pixels_digest=digest_pixels(sample.pixels),
        source_blake3=hashlib.sha256(sample.key.encode()).hexdigest(),
    )


def _audit(splits: Mapping[str, SplitEntry]) -> LeakageAudit:
    return LeakageAudit(
        unit="patient",
        salt=0,
        list_digest=None,
        unlisted=0,
        shard_prevalence={
            name: (
                min(shard.positives / shard.samples for shard in entry.shards),
                max(shard.positives / shard.samples for shard in entry.shards),
            )
            for name, entry in splits.items()
        },
        studies={name: entry.samples for name, entry in splits.items()},
        positives={name: entry.positives for name, entry in splits.items()},
        patients={name: entry.patients for name, entry in splits.items()},
        prevalence={
            name: Interval(value=entry.positives / entry.samples, low=0.0, high=1.0)
            for name, entry in splits.items()
        },
        shared_patients=0,
        leaked_by_image=0.5,
    )
