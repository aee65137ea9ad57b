"""Who is in two stores: patients, studies and pictures that a model was trained on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pneumo import storage
from pneumo.dataset.near_duplicates import find_near_duplicates
from pneumo.dataset.source import Source
from pneumo.dataset.study_keys import SECRET_CHECK
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import StoreError

SEEN = ("train", "val")
"""Splits that a model was trained or chosen on."""
NIH_FAMILY = ("rsna", "rsna-without-classes", "nih")
"""Layouts whose patients are those of NIH ChestX-ray14."""
KNOWN_PATIENTS = "studies of patients in train or val of other stores"
KNOWN_PICTURES = "pictures in train or val of other stores"


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model of some studies was trained or chosen on."""

    patients: frozenset[str]
    digests: frozenset[str]
    """See `StudyRow.pixels_digest`."""
    hashes: tuple[str, ...]
    """See `StudyRow.picture_hash`."""

    @classmethod
    def of(cls, studies: Iterable[StudyRow]) -> Self:
        """Of studies of all splits."""
        rows = [row for row in studies if row.split in SEEN]
        patients, digests = ({getattr(r, n) for r in rows} for n in ("patient", "pixels_digest"))
        return cls(frozenset(patients), frozenset(digests), tuple(r.picture_hash for r in rows))

    def find_pictures(self, rows: Sequence[StudyRow]) -> list[bool]:
        """Whether the picture of each study is one of these, even saved or scaled otherwise."""
        alike = find_near_duplicates([row.picture_hash for row in rows], self.hashes)
        return [a or row.pixels_digest in self.digests for a, row in zip(alike, rows, strict=True)]

    def leave_out_patients(self, source: Source) -> Source:
        """`source` without the studies of these patients, which are counted."""
        left = tuple(study for study in source.studies if study.patient not in self.patients)
        counted = {KNOWN_PATIENTS: len(source.studies) - len(left)}
        return replace(source, studies=left, left_out={**source.left_out, **counted})


@dataclass(frozen=True)
class Overlap:
    """Studies of an external store that are left out, by why; each is counted once."""

    keys: frozenset[str]
    patients: int
    """Patients whom the model was trained or chosen on."""
    of_patients: int
    """Studies of these patients."""
    of_pictures: int
    """Other studies whose picture the model has seen."""


def find_overlap(trained_on: Mapping[str, StudyRow], external: Mapping[str, StudyRow]) -> Overlap:
    """What of `external` the model of a store has seen, both as `read_studies` gives them."""
    seen, rows = Seen.of(trained_on.values()), list(external.values())
    of_patients = {row.key for row in rows if row.patient in seen.patients}
    found = zip(rows, seen.find_pictures(rows), strict=True)
    of_pictures = {row.key for row, is_known in found if is_known}
    return Overlap(
        keys=frozenset(of_patients | of_pictures),
        patients=len({external[key].patient for key in of_patients}),
        of_patients=len(of_patients),
        of_pictures=len(of_pictures - of_patients),
    )


def check_secret(
    store_url: str, other: str, *, is_one: bool | None, layouts: Sequence[str]
) -> str | None:
    """What to warn of where patients shared by a store and the `other` cannot be found, since it is
    not known (None) or not true that one secret made the keys of both.

    Raises StoreError where both are of `NIH_FAMILY`, so that they do share patients.
    """
    if is_one:
        return None
    what = "was prepared under another secret" if is_one is False else "may be of another secret"
    told = (
        f"{store_url.rsplit('/', 1)[-1]} {what} than {other}, so patients of both are not found; "
        "prepare both with one PNEUMO_HASH_KEY"
    )
    if all(layout in NIH_FAMILY for layout in layouts):
        raise StoreError(f"{told}: RSNA's patients are NIH's")
    return told


def have_one_secret(first_url: str, second_url: str) -> bool | None:
    """Whether the keys of two stores come from one secret; None where one does not say."""
    checks = [read_secret_check(url) for url in (first_url, second_url)]
    return None if None in checks else checks[0] == checks[1]


def read_secret_check(store_url: str) -> str | None:
    """What `Source.secret_check` was when the store was prepared; None where it does not say."""
    try:
        return storage.read_text(storage.join(store_url, SECRET_CHECK)).strip()
    except FileNotFoundError:
        return None
