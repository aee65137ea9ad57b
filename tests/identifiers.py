"""Identifiers of patients in a source, and where they are found again."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pydicom

KEYWORDS = (
    *("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress"),
    *("AccessionNumber", "InstitutionName", "ReferringPhysicianName", "DeviceSerialNumber"),
    *("StudyDate", "StudyTime", "StudyDescription"),
    *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"),
)
"""Elements of a DICOM header whose values must not leave it."""


@dataclass(frozen=True)
class Identifiers:
    """Names of a source's patients and their images."""

    texts: frozenset[str]
    """File names, header values, file names of the mapping: long enough to be unique."""
    numbers: frozenset[str]
    """Patients' numbers: eight digits, which a long decimal may contain by chance."""

    @classmethod
    def of(cls, source: Path) -> Identifiers:
        """Those of a source in Kaggle's layout."""
        texts = set()
        for path in (source / "stage_2_train_images").glob("*.dcm"):
            dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
            texts |= {str(dataset.get(keyword) or "") for keyword in KEYWORDS} | {path.stem}
        mapping = json.loads(next(source.glob("*mappings*.json")).read_text())
        images = {row["img_id"].split(".")[0] for row in mapping}
        texts |= images | {row["subset_img_id"] for row in mapping}
        return cls(frozenset(texts - {""}), frozenset(image.split("_")[0] for image in images))

    def find_in(self, *places: Path | str) -> list[str]:
        """Those that occur in a text, or in the name or unpacked content of a folder's file."""
        whole = b"\n".join(content for place in places for content in _read(place))
        found = [text for text in self.texts if text.encode() in whole]
        # As JSON, CSV, Python and the mapping's file names spell them.
        numbers = re.findall(rb"(?<![\w.])\d{8}(?=[\"',_])", whole)
        return found + [number for number in self.numbers if number.encode() in set(numbers)]


def _read(place: Path | str) -> Iterator[bytes]:
    if isinstance(place, str):
        yield place.encode()
        return
    assert place.exists(), place
    for path in [place, *place.rglob("*")]:
        yield str(path.name).encode()
        if not path.is_file() or path.is_symlink():
            continue
        if path.suffix == ".parquet":  # compresses, and shares strings
            yield json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
        elif path.suffix == ".pt":  # but for the weights
            with zipfile.ZipFile(path) as archive:
                yield b"".join(archive.read(n) for n in archive.namelist() if "/data/" not in n)
        else:
            yield path.read_bytes()
