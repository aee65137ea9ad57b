"""Patients -> train, val, test; and the audit of what the split leaks.

A patient's split is a hash of (seed, salt, patient) against fixed thresholds: it never depends on
other patients. Target and findings are balanced by choosing, among 64 salts, the one with the most
similar splits (rerandomisation: Morgan & Rubin 2012, doi:10.1214/12-AOS1008). The salt is saved
beside the source and in the manifest, so that studies added later do not change any patient's
split. A published split is read from a list instead.
"""

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy  # scipy.stats, half a second, is loaded where it is first named
from pydantic import BaseModel, Field, computed_field

from pneumo import storage
from pneumo.config import NUM_SALTS, SplitConfig
from pneumo.dataset.source import Source, Study
from pneumo.dataset.study_keys import PRIVATE_FOLDER
from pneumo.errors import AccessError, SourceError, StorageError

SPLITS = ("train", "val", "test")
SALTS_FILE = "split_salts.json"
_OWN_SPLIT = ("own-table", "nih")
"""Layouts whose published split is the default."""
_SKEWED_P = 1e-6
"""Class ratios less probable than this, over all shards, are taken as not random."""


class Interval(BaseModel, frozen=True):
    """A fraction with its 95 % interval."""

    value: float
    low: float
    high: float


class LeakageAudit(BaseModel, frozen=True):
    """Facts about the split, for the manifest and the report."""

    unit: str
    """'patient' or 'image': what is never divided between splits."""
    salt: int | None
    """Which of the seed's splits this is; null where a list gives the split."""
    named: str | None = Field(default=None, exclude_if=lambda value: value is None)
    """The named split, or 'published' for the source's own; not written where there is none."""
    list_digest: str | None
    """`sha256:` and the digest of the list."""
    unlisted: int
    """Studies that are not on the list, so in no split."""
    studies: dict[str, int]
    """Studies by split."""
    positives: dict[str, int]
    """Studies with Target 1 by split."""
    patients: dict[str, int] | None
    """Patients by split; null where patients are unknown."""
    prevalence: dict[str, Interval]
    """Positives / studies by split; for the interval see `clustered_fraction`."""
    shard_prevalence: dict[str, tuple[float, float]]
    """Lowest and highest fraction of positives among the split's shards."""
    shared_patients: int | None
    """Patients in more than one split: 0 for unit 'patient'; null where patients are unknown."""
    leaked_by_image: float | None
    """Fraction of val studies whose patient is also in train in a split by image: this split, or
    the one by image with the same settings. Null where patients are unknown."""

    @property
    def has_patients(self) -> bool:
        """Whether patients are known."""
        return self.patients is not None

    @computed_field  # type: ignore[prop-decorator]  # so that the manifest contains it
    @property
    def warning(self) -> str | None:
        """The caveat for metrics on this split, or None."""
        if self.unit == "patient":
            return None
        if self.leaked_by_image is None:
            leak = (
                "an unknown fraction of the val studies have their patient in train, and "
                "intervals, which take each image for a patient's only one, are too narrow"
            )
        else:
            leak = (
                f"{self.leaked_by_image:.0%} of the val studies have their patient in train, and "
                f"{self.shared_patients} patients are in more than one split"
            )
        return f"split by image: {leak}; every metric will be too good"


@dataclass(frozen=True)
class Split:
    """The split of each study."""

    by_key: Mapping[str, str]
    """Study key -> 'train', 'val' or 'test'."""
    audit: LeakageAudit


def split_studies(
    studies: Sequence[Study],
    config: SplitConfig,
    *,
    seed: int,
    has_patients: bool,
    listed: Mapping[str, str] | None = None,
) -> Split:
    """Assign every study to a split and audit the result.

    `listed` maps study keys or patients to splits, and studies that are not in it are left out;
    without it the patient's hash decides. Raises SourceError when patients are unknown and
    `split.unit` is patient, when a list divides a patient, or when a split would lack positives or
    negatives.
    """
    if config.unit == "patient" and not has_patients:
        raise SourceError(
            "patients are unknown, so a patient could be in several splits; use --split.unit image "
            "to accept that, or, for RSNA, add pneumonia-challenge-dataset-mappings_2018.json to "
            "the source (up to 65 images are of one patient)"
        )
    if not studies:
        raise SourceError("no studies, so nothing to split; check the source's tables")
    if listed is None:
        salt = choose_salt(studies, config, seed=seed) if config.salt is None else config.salt
        by_group = assign_groups({_group(s, config) for s in studies}, config, seed, salt)
        by_key = {s.key: by_group[_group(s, config)] for s in studies}
    else:
        salt = None
        by_key = _assign_listed(studies, listed)
    audit = audit_split(studies, by_key, config, seed=seed, salt=salt, has_patients=has_patients)
    if config.unit == "patient" and audit.shared_patients:
        raise SourceError(
            f"the list puts {audit.shared_patients} patients into two splits; use --split.unit "
            "image to accept that every metric will be too good, or --split.named hash"
        )
    return Split(by_key, audit)


def find_published(source: Source, config: SplitConfig, *, seed: int) -> dict[str, str] | None:
    """The split by study key of a named split or of the source's tables; None where the patients'
    hash decides.

    A published split of train and val together is divided by the patients' hash. Raises SourceError
    where the settings ask for a published split and the source has none.
    """
    published = [s for s in source.studies if s.published is not None]
    if config.named is None and source.layout in _OWN_SPLIT and config.list is None:
        is_used = bool(published)
    else:
        is_used = config.named not in (None, "hash")
    if not is_used:
        return None
    if not published:
        raise SourceError(f"--split.named {config.named}: {source.title} has no published split")
    groups = sorted({s.patient for s in published if s.published == "train_val"})
    uniforms = _uniform(groups, seed, range(1))[:, 0].tolist()
    bound = config.val_fraction / (1 - config.test_fraction)
    divided = {
        group: "val" if u < bound else "train" for group, u in zip(groups, uniforms, strict=True)
    }
    return {
        s.key: divided.get(s.patient, "") if s.published == "train_val" else str(s.published)
        for s in published
    }


def assign_groups(
    groups: Collection[str], config: SplitConfig, seed: int, salt: int
) -> dict[str, str]:
    """The split of each patient (or image): for each a pure function of the other arguments."""
    chosen = _choose_splits(_uniform(groups, seed, range(salt, salt + 1)), config)[:, 0].tolist()
    return {group: SPLITS[i] for group, i in zip(groups, chosen, strict=True)}


def choose_salt(studies: Sequence[Study], config: SplitConfig, *, seed: int) -> int:
    """The best balanced salt: the one whose largest relative deviation, over the findings of val
    and test, from the wanted fraction is smallest.

    Salts with both classes in every split are preferred to this. Ties, which are frequent for few
    studies, go to the smallest sum of deviations.
    """
    groups = sorted({_group(s, config) for s in studies})
    index = {group: i for i, group in enumerate(groups)}
    findings = sorted({s.finding for s in studies})
    counts, classes = np.zeros((len(groups), len(findings))), np.zeros((len(groups), 2))
    for s in studies:
        counts[index[_group(s, config)], findings.index(s.finding)] += 1
        classes[index[_group(s, config)], s.target] += 1
    chosen = _choose_splits(_uniform(groups, seed, range(NUM_SALTS)), config)
    missing, worst, total = np.zeros((3, NUM_SALTS))
    for split, fraction in enumerate((None, config.val_fraction, config.test_fraction)):
        members = (chosen == split).T.astype(np.float64)
        missing += (members @ classes == 0).sum(axis=1)
        if fraction is not None:
            deviation = np.abs(members @ counts / counts.sum(axis=0) - fraction) / fraction
            worst = np.maximum(worst, deviation.max(axis=1))
            total += deviation.sum(axis=1)
    return int(np.lexsort((total, worst, missing))[0])


def read_salt(source_url: str, config: SplitConfig, *, seed: int) -> int | None:
    """The salt that is saved beside the source for these fractions, or None. Raises SourceError for
    an invalid file."""
    salt = _read_salts(source_url).get(_salt_name(config, seed))
    if salt is not None and not (isinstance(salt, int) and 0 <= salt < NUM_SALTS):
        raise SourceError(f"{_salts_url(source_url)}: salt {salt!r}; delete the file")
    return salt


def save_salt(source_url: str, config: SplitConfig, *, seed: int, salt: int) -> bool:
    """Save the salt beside the source; returns False where the folder cannot be written."""
    salts = {**_read_salts(source_url), _salt_name(config, seed): salt}
    try:
        storage.write_text(_salts_url(source_url), json.dumps(salts, indent=1) + "\n")
    except (AccessError, StorageError):
        return False
    return True


def audit_split(
    studies: Sequence[Study],
    by_key: Mapping[str, str],
    config: SplitConfig,
    *,
    seed: int,
    salt: int | None,
    has_patients: bool,
) -> LeakageAudit:
    """The audit of these studies, which may be a subset of those that were split.

    Raises SourceError when a split lacks positives or negatives.
    """
    assigned = [s for s in studies if s.key in by_key]
    _check_classes(assigned, by_key)
    by_image = by_key
    if config.unit == "patient":
        by_image = assign_groups([s.key for s in assigned], config, seed, salt or 0)
    members: dict[str, list[tuple[str, int]]] = {name: [] for name in SPLITS}
    for s in assigned:
        members[by_key[s.key]].append((s.patient, s.target))
    patients = {name: {patient for patient, _ in pairs} for name, pairs in members.items()}
    num_splits = Counter(patient for group in patients.values() for patient in group)
    return LeakageAudit(
        unit=config.unit,
        salt=salt,
        named=None if config.named == "hash" else config.named,
        list_digest=config.list,
        unlisted=len(studies) - len(assigned),
        studies={name: len(pairs) for name, pairs in members.items()},
        positives={name: sum(target for _, target in pairs) for name, pairs in members.items()},
        patients={name: len(patients[name]) for name in SPLITS} if has_patients else None,
        prevalence={name: clustered_fraction(pairs) for name, pairs in members.items()},
        shard_prevalence={},
        shared_patients=sum(n > 1 for n in num_splits.values()) if has_patients else None,
        leaked_by_image=_leaked_fraction(assigned, by_image) if has_patients else None,
    )


def clustered_fraction(pairs: Sequence[tuple[str, int]]) -> Interval:
    """The fraction of ones among `(patient, 0 or 1)`, with its 95 % interval.

    Studies of one patient are correlated: the interval is Clopper-Pearson's with the effective
    sample size (Korn & Graubard 1998, Survey Methodology 24:193).
    """
    value, _, effective = measure(pairs)
    k = value * effective
    low = float(scipy.stats.beta.ppf(0.025, k, effective - k + 1)) if value > 0 else 0.0
    high = float(scipy.stats.beta.ppf(0.975, k + 1, effective - k)) if value < 1 else 1.0
    return Interval(value=value, low=low, high=high)


class Moments(NamedTuple):
    """Mean and variance of a value of studies, and how many independent studies they are worth."""

    mean: float
    variance: float
    effective: float
    """The number of independent studies whose mean has the same variance; at most the number of
    studies. The variance is that of a ratio of patients' sums."""


def measure(pairs: Sequence[tuple[str, float]]) -> Moments:
    """The moments of the values in `(patient, value)`, of any order; at least one."""
    mean = statistics.fmean(value for _, value in pairs)  # rounds once
    residuals: dict[str, list[float]] = {}
    for patient, value in pairs:
        residuals.setdefault(patient, []).append(value - mean)
    m = len(residuals)
    if len({value for _, value in pairs}) == 1:  # rounding may give a tiny variance
        return Moments(mean, 0.0, m)
    variance = statistics.fmean((value - mean) ** 2 for _, value in pairs)
    squares = math.fsum(math.fsum(own) ** 2 for own in residuals.values())
    variance_of_mean = m / max(m - 1, 1) * squares / len(pairs) ** 2
    effective = min(variance / variance_of_mean, len(pairs)) if variance_of_mean > 0 else m
    return Moments(mean, variance, effective)


def check_shard_balance(
    shards: Mapping[str, Sequence[tuple[int, int]]],
) -> dict[str, tuple[float, float]]:
    """Lowest and highest fraction of positives by split, from each shard's (samples, positives).

    Raises SourceError for a shard whose class ratio is improbable in a random order.
    """
    number = sum(len(entries) for entries in shards.values())
    for split, entries in shards.items():
        total, positives = (sum(column) for column in zip(*entries, strict=True))
        for i, (n, k) in enumerate(entries):
            expected = scipy.stats.hypergeom(total, positives, n)
            p = 2 * min(expected.cdf(k), expected.sf(k - 1))
            if p < _SKEWED_P / number:
                raise SourceError(
                    f"split {split}: shard {i} has {k} positives of {n}, the split {positives} of "
                    f"{total}: not a random draw; shards must be shuffled"
                )
    return {
        split: (min(k / n for n, k in entries), max(k / n for n, k in entries))
        for split, entries in shards.items()
    }


def _group(study: Study, config: SplitConfig) -> str:
    return study.patient if config.unit == "patient" else study.key


def _uniform(groups: Collection[str], seed: int, salts: range) -> npt.NDArray[np.float64]:
    """(groups, salts) uniform numbers in [0, 1)."""
    span = slice(8 * salts.start, 8 * salts.stop)
    stream = b"".join(
        hashlib.shake_128(f"{seed}/{group}".encode()).digest(span.stop)[span] for group in groups
    )
    return np.frombuffer(stream, ">u8").reshape(-1, len(salts)).astype(np.float64) / 2.0**64


def _choose_splits(u: npt.NDArray[np.float64], config: SplitConfig) -> npt.NDArray[np.int8]:
    """Indices into SPLITS, same shape: val below `val_fraction`, then test, then train."""
    bounds = [config.val_fraction, config.val_fraction + config.test_fraction]
    return np.array([1, 2, 0], np.int8)[np.searchsorted(bounds, u, side="right")]


def _assign_listed(studies: Sequence[Study], listed: Mapping[str, str]) -> dict[str, str]:
    found = ((s.key, listed.get(s.key) or listed.get(s.patient)) for s in studies)
    by_key = {key: split for key, split in found if split is not None}
    if not by_key:
        raise SourceError("the list names none of the source's studies; is it of another data set?")
    return by_key


def _salts_url(source_url: str) -> str:
    return storage.join(source_url, PRIVATE_FOLDER, SALTS_FILE)


def _salt_name(config: SplitConfig, seed: int) -> str:
    return f"{config.unit} val {config.val_fraction:g} test {config.test_fraction:g} seed {seed}"


def _read_salts(source_url: str) -> dict[str, int]:
    try:
        salts = json.loads(storage.read_text(_salts_url(source_url)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, AccessError) as error:
        raise SourceError(f"{_salts_url(source_url)}: not readable; delete the file") from error
    return dict(salts)


def _check_classes(studies: Sequence[Study], by_key: Mapping[str, str]) -> None:
    present = Counter((by_key[s.key], s.target) for s in studies)
    for split in SPLITS:
        for target, name in ((1, "positive"), (0, "negative")):
            if not present[split, target]:
                raise SourceError(
                    f"split {split} would have no {name} study ({len(studies)} studies in all); "
                    "use more studies or other --split fractions"
                )


def _leaked_fraction(studies: Sequence[Study], by_image: Mapping[str, str]) -> float:
    """Fraction of val studies whose patient is also in train."""
    trained_on = {s.patient for s in studies if by_image[s.key] == "train"}
    val = [s.patient for s in studies if by_image[s.key] == "val"]
    return sum(patient in trained_on for patient in val) / max(len(val), 1)
