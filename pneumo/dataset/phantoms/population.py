"""Who the phantoms are: the studies of a seed, with what makes the real data hard.

Several studies of one patient, AP views far more often positive than PA, two kinds of negatives.
Not imitated: the names (UUIDs) of the real files reveal the label.
"""

import uuid
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pneumo.dataset.source import Finding

# Fractions of the 26,684 real training images.
_POSITIVE, _NORMAL = 0.225, 0.332
_AP: dict[Finding, float] = {
    "Lung Opacity": 0.776,
    "No Lung Opacity / Not Normal": 0.497,
    "Normal": 0.185,
}
_PIXEL_SPACINGS_MM = (0.143, 0.168, 0.139, 0.171, 0.194311)


@dataclass(frozen=True)
class PhantomStudy:
    """One image to be: its labels and header values; the pixels follow from it alone."""

    seed: int
    patient: int
    index: int
    """Its number among the patient's studies, from 0."""
    finding: Finding
    sex: Literal["M", "F"]
    age: int
    view: Literal["AP", "PA"]
    pixel_spacing_mm: float
    name: str
    """The UUID that Kaggle calls patientId."""

    @property
    def positive(self) -> bool:
        """Whether the study's Target is 1."""
        return self.finding == "Lung Opacity"


def draw_population(num_studies: int, seed: int) -> tuple[PhantomStudy, ...]:
    """The studies of a population, in order of their names.

    22.5 % are positive, 33.2 % normal; from three studies on every finding is there. Findings go
    by rank of a severity that a patient's studies have in common in part. Raises ValueError unless
    `num_studies` >= 1 and `seed` >= 0.
    """
    if num_studies < 1 or seed < 0:
        raise ValueError(f"phantoms: got {num_studies=}, {seed=}; expected >= 1 and >= 0")
    # No patient has more than an eighth, so that a small set can still be split by patient.
    most = int(np.clip(num_studies // 8, 3, 40))
    members: list[tuple[int, int]] = []
    severities: list[float] = []
    patient = 0
    while len(members) < num_studies:
        rng = generator(seed, patient)
        # A Pareto tail as in the real mapping: 62 % have one study. Patient 0 has two or more.
        count = min(max(int(rng.pareto(1.4)) + 1, 2 if patient == 0 else 1), most)
        members += [(patient, i) for i in range(count)]
        severities += list(0.6 * rng.normal() + 0.8 * rng.normal(size=count))
        patient += 1
    at_least = int(num_studies >= 3)
    num_positive = max(round(_POSITIVE * num_studies), at_least)
    num_normal = max(round(_NORMAL * num_studies), at_least)
    findings: list[Finding] = ["No Lung Opacity / Not Normal"] * num_studies
    order = np.argsort(severities[:num_studies])
    for i in order[:num_normal]:
        findings[i] = "Normal"
    for i in order[num_studies - num_positive :]:
        findings[i] = "Lung Opacity"
    studies = [_draw_study(seed, *members[i], finding) for i, finding in enumerate(findings)]
    return tuple(sorted(studies, key=lambda study: study.name))


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the seed and on the numbers of a patient, a study, a stream."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _draw_study(seed: int, patient: int, index: int, finding: Finding) -> PhantomStudy:
    person, rng = generator(seed, patient, 0), generator(seed, patient, 1 + index, 0)
    is_man = person.random() < 0.57
    age = min(int(np.clip(person.normal(47, 17), 1, 90)) + index // 3, 90)
    return PhantomStudy(
        seed=seed,
        patient=patient,
        index=index,
        finding=finding,
        sex="M" if is_man else "F",
        # About one age in a hundred is a slip of the pen, as 151 is in the real headers.
        age=int(rng.integers(148, 156)) if rng.random() < 0.01 else age,
        view="AP" if rng.random() < _AP[finding] else "PA",
        pixel_spacing_mm=float(rng.choice(_PIXEL_SPACINGS_MM, p=(0.34, 0.33, 0.2, 0.08, 0.05))),
        name=str(uuid.UUID(bytes=rng.bytes(16), version=4)),
    )
