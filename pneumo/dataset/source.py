"""The studies of a data set's folder, under keyed hashes in place of identifiers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pneumo.images.boxes import Box
from pneumo.images.headers import Header

Finding = Literal["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]
"""RSNA's; other layouts have their own findings, and 'Normal' for an image without any."""
RSNA = "rsna"


@dataclass(frozen=True, slots=True)
class Study:
    """One frontal radiograph and its labels."""

    key: str
    """Keyed hash of the image id, 20 hex digits; without a dot, as webdataset requires."""
    patient: str
    """Keyed hash of the patient; of the image id where patients are unknown."""
    url: str
    """The image file. Contains an identifier, so it is never written to a store."""
    target: int
    """1 for pneumonia, 0 otherwise."""
    finding: str
    """The readers' finding; one of `Finding` in RSNA's layout."""
    boxes: tuple[Box, ...]
    """Opacities in pixels of the original image; empty for negatives."""
    layout: str = RSNA
    """Layout of the source."""
    header: Header | None = None
    """Values of the tables, which replace those of the file's header."""
    published: str | None = None
    """The split in the source's tables or in a named split: train, val, test, or train_val for the
    two together."""

    def describe(self) -> list[object]:
        """All that the study's sample and row depend on, except the file; for digests."""
        rsna = [self.key, self.patient, self.target, self.finding, self.boxes]
        if self.layout == RSNA and self.published is None:
            return rsna
        header = self.header
        values = header and [header.age, header.sex, header.view, header.spacing_mm]
        return [*rsna, self.layout, values, self.published]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A study that cannot be used. Contains nothing of its header or its file's name."""

    key: str
    split: str | None
    """None where it was rejected before the split."""
    reason: str
    """A code: contradiction, missing, unreadable, or one of `pneumo.errors.DicomError`."""
    message: str


@dataclass(frozen=True)
class Source:
    """The content of a data set's folder."""

    studies: tuple[Study, ...]
    """Sorted by key, so in an order unrelated to ids and labels."""
    rejected: tuple[Rejected, ...]
    """Studies with contradictory tables or a missing file."""
    has_patients: bool
    """Whether the tables name the patients."""
    unlabelled: int
    """Images with a file or a class, but without a label; they are left out."""
    file_key: bytes = field(repr=False)
    """See `study_keys.derive_file_key`."""
    secret_check: str
    """See `study_keys.derive_secret_check`."""
    layout: str = RSNA
    joined_layouts: tuple[str, ...] = ()
    """See `Manifest.joined_layouts`."""
    title: str = "RSNA (Kaggle)"
    """The layout's name for users."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of images that the layout's rules leave out, by reason."""
    notes: tuple[str, ...] = ()
    """Further notes for the user, on guesses and policies."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of the tables, with keyed hashes for ids."""
        rows = [s.describe() for s in self.studies]
        rejected = [(item.key, item.message) for item in self.rejected]
        return hashlib.sha256(json.dumps([rows, rejected]).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """One line: `CheXpert, 223,414 studies of 64,540 patients; 32,387 lateral views left
        out`."""
        counts = f"{self.title}, {len(self.studies):,} studies"
        if self.has_patients:
            counts += f" of {len({study.patient for study in self.studies}):,} patients"
        left = [f"{number:,} {why} left out" for why, number in self.left_out.items() if number]
        return "; ".join([counts, *left, *self.notes])
