"""Overlap of stores: patients and images that a model was trained or chosen on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pneumo import storage
from pneumo.dataset.near_duplicates import find_near_duplicates
from pneumo.dataset.source import Source
from pneumo.dataset.study_keys import SECRET_CHECK
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import StoreError

KNOWN_SPLITS = ("train", "val")
"""Splits that a model was trained or chosen on."""
NIH_FAMILY = ("rsna", "rsna-without-classes", "nih")
"""Layouts with patients of NIH ChestX-ray14."""
KNOWN_PATIENTS = "studies of patients in train or val of other stores"
KNOWN_PICTURES = "pictures in train or val of other stores"


@dataclass(frozen=True, eq=False)
class KnownStudies:
    """Patients and images that a model was trained or chosen on."""

    patients: frozenset[str]
    digests: frozenset[str]
    """See `StudyRow.pixels_digest`."""
    hashes: tuple[str, ...]
    """See `StudyRow.picture_hash`."""

    @classmethod
    def of(cls, studies: Iterable[StudyRow]) -> Self:
        """Those in train and val of `studies`, which are of all splits."""
        rows = [row for row in studies if row.split in KNOWN_SPLITS]
        patients, digests = ({getattr(r, n) for r in rows} for n in ("patient", "pixels_digest"))
        return cls(frozenset(patients), frozenset(digests), tuple(r.picture_hash for r in rows))

    def match_pictures(self, rows: Sequence[StudyRow]) -> list[bool]:
        """Whether the image of each row is a known one, also where encoded or scaled otherwise."""
        similar = find_near_duplicates([row.picture_hash for row in rows], self.hashes)
        return [s or r.pixels_digest in self.digests for s, r in zip(similar, rows, strict=True)]

    def leave_out_patients(self, source: Source) -> Source:
        """`source` without the studies of known patients, with their number in `left_out`."""
        kept = tuple(study for study in source.studies if study.patient not in self.patients)
        number = {KNOWN_PATIENTS: len(source.studies) - len(kept)}
        return replace(source, studies=kept, left_out={**source.left_out, **number})


@dataclass(frozen=True)
class Overlap:
    """Studies of an external store that are left out, by reason; each is counted once."""

    keys: frozenset[str]
    patients: int
    """Patients that the model was trained or chosen on."""
    of_patients: int
    """Studies of these patients."""
    of_pictures: int
    """Other studies whose image the model was trained or chosen on."""
    of_their_patients: int
    """Other studies of the patients of these images, whose key is another in each data set."""


def find_overlap(trained_on: Mapping[str, StudyRow], external: Mapping[str, StudyRow]) -> Overlap:
    """The studies of `external` that a model trained on `trained_on` knows; both are rows by key,
    from `read_studies`."""
    known, rows = KnownStudies.of(trained_on.values()), list(external.values())
    of_patients = {row.key for row in rows if row.patient in known.patients}
    matches = zip(rows, known.match_pictures(rows), strict=True)
    of_pictures = {row.key for row, is_known in matches if is_known}
    seen = {external[key].patient for key in of_pictures}
    of_seen = {row.key for row in rows if row.patient in seen}
    return Overlap(
        keys=frozenset(of_patients | of_pictures | of_seen),
        patients=len({external[key].patient for key in of_patients}),
        of_patients=len(of_patients),
        of_pictures=len(of_pictures - of_patients),
        of_their_patients=len(of_seen - of_pictures - of_patients),
    )


def check_secret(
    store_url: str, other: str, *, is_one: bool | None, layouts: Sequence[Sequence[str]]
) -> str | None:
    """The warning that patients shared by a store and the `other` cannot be found, because their
    keys do not come from one secret (`is_one` False) or may not (None); None where they do.

    Raises StoreError where both have one of `layouts` in `NIH_FAMILY`: they do share patients then.
    """
    if is_one:
        return None
    what = "was prepared with another secret" if is_one is False else "may have another secret"
    warning = (
        f"{store_url.rsplit('/', 1)[-1]} {what} than {other}, so patients in both are not found; "
        "prepare both with the same PNEUMO_HASH_KEY"
    )
    if all(set(NIH_FAMILY).intersection(names) for names in layouts):
        raise StoreError(f"{warning}: RSNA's patients are a part of NIH's")
    return warning


def have_one_secret(first_url: str, second_url: str) -> bool | None:
    """Whether the keys of two stores come from one secret; None where it is unknown."""
    checks = [read_secret_check(url) for url in (first_url, second_url)]
    return None if None in checks else checks[0] == checks[1]


def read_secret_check(store_url: str) -> str | None:
    """`Source.secret_check` of the store's source; None in stores of older versions, and of joined
    ones with several secrets."""
    return (storage.find_text(storage.join(store_url, SECRET_CHECK)) or "").strip() or None
