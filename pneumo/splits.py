"""Patients -> train, val, test; and the audit that says what the split does and does not leak.

A patient's place is a hash of (seed, salt, patient) against fixed thresholds, so it never depends
on who else is there. Balance comes from choosing, among 64 salts, the one whose splits look most
alike (rerandomisation: Morgan & Rubin 2012, doi:10.1214/12-AOS1008); the manifest states the salt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from scipy.stats import beta

from pneumo.config import SplitConfig
from pneumo.errors import SourceError
from pneumo.studies import Study

SPLITS = ("train", "val", "test")
_CANDIDATE_SALTS = 64


class Interval(BaseModel):
    """A share with its 95 % interval."""

    model_config = ConfigDict(frozen=True)
    value: float
    low: float
    high: float


class LeakageAudit(BaseModel):
    """What the manifest and the report state about the split."""

    model_config = ConfigDict(frozen=True)

    unit: str
    """'patient' or 'image': what was kept whole."""
    salt: int
    studies: dict[str, int]
    """Studies by split."""
    positives: dict[str, int]
    """Studies with Target 1 by split."""
    patients: dict[str, int]
    """Patients by split."""
    prevalence: dict[str, Interval]
    """Positives / studies by split; Clopper-Pearson over patients' effective number."""
    shared_patients: int
    """Patients in more than one split: 0 for unit 'patient'."""
    leaked_by_image: float | None
    """Share of val studies whose patient a split by image would have put into train as well;
    null where the mapping does not say who the patients are."""


@dataclass(frozen=True)
class Split:
    """Which split each study belongs to."""

    by_key: Mapping[str, str]
    """Study key -> 'train', 'val' or 'test'."""
    audit: LeakageAudit


def split_studies(
    studies: Sequence[Study], config: SplitConfig, *, seed: int, has_patients: bool
) -> Split:
    """Assign every study to a split and audit the result.

    Raises SourceError when patients are unknown and the split is to be by patient, or when a split
    would lack positives or negatives.
    """
    if config.unit == "patient" and not has_patients:
        raise SourceError(
            "no mapping file, so patients are unknown and a split would leak them (up to 65 images "
            "are of one patient); put pneumonia-challenge-dataset-mappings_2018.json into the "
            "source, or say --split.unit image to accept that"
        )
    if not studies:
        raise SourceError("no studies, so nothing to split; check the source's label table")
    salts = range(_CANDIDATE_SALTS) if config.salt is None else (config.salt,)
    groups = {s.key: s.patient if config.unit == "patient" else s.key for s in studies}
    salt, by_key = min(
        ((salt, _assign(groups, config, seed, salt)) for salt in salts),
        key=lambda candidate: (_imbalance(studies, candidate[1], config), candidate[0]),
    )
    _check_classes(studies, by_key)
    by_image = _assign({s.key: s.key for s in studies}, config, seed, salt)
    audit = _audit(studies, by_key, config.unit, salt, by_image if has_patients else None)
    if config.unit == "patient" and audit.shared_patients:
        raise AssertionError(f"{audit.shared_patients} patients are in two splits")
    return Split(by_key, audit)


def place_patient(patient: str, config: SplitConfig, *, seed: int, salt: int) -> str:
    """The split of one patient: a pure function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{salt}/{patient}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < config.val_fraction:
        return "val"
    return "test" if u < config.val_fraction + config.test_fraction else "train"


def _assign(groups: Mapping[str, str], config: SplitConfig, seed: int, salt: int) -> dict[str, str]:
    placed: dict[str, str] = {}
    for group in groups.values():
        if group not in placed:
            placed[group] = place_patient(group, config, seed=seed, salt=salt)
    return {key: placed[group] for key, group in groups.items()}


def _imbalance(studies: Sequence[Study], by_key: Mapping[str, str], config: SplitConfig) -> float:
    """Largest deviation from the wanted share, over each finding's studies in val and test."""
    wanted = {"val": config.val_fraction, "test": config.test_fraction}
    total = Counter(s.finding for s in studies)
    got = Counter((by_key[s.key], s.finding) for s in studies)
    return max(
        abs(got[split, finding] / number - share) / share
        for split, share in wanted.items()
        for finding, number in total.items()
    )


def _check_classes(studies: Sequence[Study], by_key: Mapping[str, str]) -> None:
    present = Counter((by_key[s.key], s.target) for s in studies)
    for split in SPLITS:
        for target, name in ((1, "positive"), (0, "negative")):
            if not present[split, target]:
                raise SourceError(
                    f"split {split} would have no {name} study ({len(studies)} studies in all); "
                    "use more studies or other --split fractions"
                )


def _audit(
    studies: Sequence[Study],
    by_key: Mapping[str, str],
    unit: str,
    salt: int,
    by_image: Mapping[str, str] | None,
) -> LeakageAudit:
    patients = {name: {s.patient for s in studies if by_key[s.key] == name} for name in SPLITS}
    number = Counter(by_key[s.key] for s in studies)
    positives = Counter(by_key[s.key] for s in studies if s.target)
    everyone = set().union(*patients.values())
    return LeakageAudit(
        unit=unit,
        salt=salt,
        studies={name: number[name] for name in SPLITS},
        positives={name: positives[name] for name in SPLITS},
        patients={name: len(patients[name]) for name in SPLITS},
        prevalence={
            name: _prevalence(positives[name], number[name], len(patients[name])) for name in SPLITS
        },
        shared_patients=sum(sum(p in group for group in patients.values()) > 1 for p in everyone),
        leaked_by_image=None if by_image is None else _leaked(studies, by_image),
    )


def _prevalence(positives: int, studies: int, patients: int) -> Interval:
    """Clopper-Pearson on the number of patients: images of one patient are no new evidence."""
    value = positives / studies
    k = value * patients
    low = float(beta.ppf(0.025, k, patients - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(0.975, k + 1, patients - k)) if k < patients else 1.0
    return Interval(value=value, low=low, high=high)


def _leaked(studies: Sequence[Study], by_image: Mapping[str, str]) -> float:
    trained_on = {s.patient for s in studies if by_image[s.key] == "train"}
    val = [s.patient for s in studies if by_image[s.key] == "val"]
    return sum(patient in trained_on for patient in val) / max(len(val), 1)
