"""Who is in two stores: patients, studies and pictures that a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pneumo import storage
from pneumo.dataset.preparation import SECRET_CHECK
from pneumo.dataset.study_table import StudyRow

SEEN = ("train", "val")
"""Splits that a model was trained or chosen on."""
NIH_FAMILY = ("rsna", "rsna-without-classes", "nih")
"""Layouts whose patients are those of NIH ChestX-ray14."""


@dataclass(frozen=True)
class Overlap:
    """Studies of an external store that are left out, by why; each is counted once."""

    keys: frozenset[str]
    patients: int
    """Patients whom the model was trained or chosen on."""
    of_patients: int
    """Studies of theirs."""
    of_pictures: int
    """Other studies whose stored picture is, pixel by pixel, one that the model has seen."""


def find_overlap(trained_on: Mapping[str, StudyRow], external: Mapping[str, StudyRow]) -> Overlap:
    """What the model of a store has seen of `external`; both as `read_studies` gives them."""
    seen = [row for row in trained_on.values() if row.split in SEEN]
    patients = {row.patient for row in seen}
    pictures = {row.pixels_digest for row in seen}
    of_patients = {row.key for row in external.values() if row.patient in patients}
    of_pictures = {row.key for row in external.values() if row.pixels_digest in pictures}
    return Overlap(
        keys=frozenset(of_patients | of_pictures),
        patients=len({external[key].patient for key in of_patients}),
        of_patients=len(of_patients),
        of_pictures=len(of_pictures - of_patients),
    )


def have_one_secret(first_url: str, second_url: str) -> bool | None:
    """Whether the keys of two stores come from one secret; None where one does not say."""
    checks = [_read_check(url) for url in (first_url, second_url)]
    return None if None in checks else checks[0] == checks[1]


def _read_check(store_url: str) -> str | None:
    try:
        return storage.read_text(storage.join(store_url, SECRET_CHECK)).strip()
    except FileNotFoundError:
        return None
