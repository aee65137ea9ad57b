"""What is read of a data set's folder: its studies, keyed so that nobody can be named."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pneumo.images.boxes import Box
from pneumo.images.headers import Header

Finding = Literal["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]
"""RSNA's; other layouts have words of their own, and 'Normal' for a picture without any finding."""
RSNA = "rsna"


@dataclass(frozen=True, slots=True)
class Study:
    """One frontal radiograph and what the readers said of it."""

    key: str
    """Keyed hash of the image id, 20 hex digits; in webdataset, no key holds a dot."""
    patient: str
    """Keyed hash of the patient; of the image id where nobody knows who they are."""
    url: str
    """The image file. It carries an identifier and stays beside the source."""
    target: int
    """1 for pneumonia, 0 otherwise."""
    finding: str
    """What the readers called it; one of `Finding` in RSNA's layout."""
    boxes: tuple[Box, ...]
    """Opacities in pixels of the original image; empty for negatives."""
    layout: str = RSNA
    """Of the source's folder."""
    header: Header | None = None
    """What the tables say, which goes before the file's own header."""
    published: str | None = None
    """The split that the source's tables, or a named split, put it in: train, val, test, or
    train_val for the two together."""

    def describe(self) -> list[object]:
        """All that the study's sample and row follow from, the file aside, for digests."""
        rsna = [self.key, self.patient, self.target, self.finding, self.boxes]
        if self.layout == RSNA and self.published is None:
            return rsna
        header = self.header
        values = header and [header.age, header.sex, header.view, header.spacing_mm]
        return [*rsna, self.layout, values, self.published]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A study that cannot be used. Nothing from its header or its file's name stands in it."""

    key: str
    split: str | None
    """None when it was rejected before it was given one."""
    reason: str
    """A code: contradiction, missing, unreadable, or one of `pneumo.errors.DicomError`."""
    message: str


@dataclass(frozen=True)
class Source:
    """A folder of a known layout, read."""

    studies: tuple[Study, ...]
    """Sorted by key, so in no order of ids or labels."""
    rejected: tuple[Rejected, ...]
    """Studies on which the tables disagree."""
    has_patients: bool
    """Whether the tables told who the patients are."""
    unlabelled: int
    """Images that have a file or a class, but no label; they are left out."""
    file_key: bytes = field(repr=False)
    """See `study_keys.derive_file_key`."""
    secret_check: str
    """See `study_keys.derive_secret_check`."""
    layout: str = RSNA
    title: str = "RSNA (Kaggle)"
    """The layout as people call it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Images that the layout's own rules leave out, by why."""
    notes: tuple[str, ...] = ()
    """What a user should know besides: a guess, a policy."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the tables say, with keyed hashes for ids."""
        rows = [s.describe() for s in self.studies]
        rejected = [(item.key, item.message) for item in self.rejected]
        return hashlib.sha256(json.dumps([rows, rejected]).encode()).hexdigest()

    @property
    def summary(self) -> str:
        """One line: `CheXpert, 223,414 studies of 64,540 patients; 32,387 lateral views left
        out`."""
        told = f"{self.title}, {len(self.studies):,} studies"
        if self.has_patients:
            told += f" of {len({study.patient for study in self.studies}):,} patients"
        left = [f"{number:,} {why} left out" for why, number in self.left_out.items() if number]
        return "; ".join([told, *left, *self.notes])
