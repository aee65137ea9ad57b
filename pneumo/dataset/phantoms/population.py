"""The population of phantoms: the studies of a seed, with the difficulties of the real data.

Several studies per patient, AP views much more often positive than PA, two kinds of negatives. Not
imitated: that the names (UUIDs) of the real files reveal the label.
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
    """Labels and header values of an image, which determine its pixels."""

    seed: int
    patient: int
    index: int
    """Index among the patient's studies, from 0."""
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
    """The studies of a population, sorted by name.

    22.5 % are positive, 33.2 % normal; three or more studies have every finding. Findings are
    assigned by rank of a severity, which is correlated within a patient. Raises ValueError unless
    `num_studies` >= 1 and `seed` >= 0.
    """
    if num_studies < 1 or seed < 0:
        raise ValueError(f"phantoms: got {num_studies=}, {seed=}; expected >= 1 and >= 0")
    # No patient has more than an eighth, so that a small set can still be split by patient.
    max_studies = int(np.clip(num_studies // 8, 3, 40))
    members: list[tuple[int, int]] = []
    severities: list[float] = []
    patient = 0
    while len(members) < num_studies:
        rng = generator(seed, patient)
        # A Pareto tail as in the real mapping: 62 % have one study. Patient 0 has two or more.
        count = min(max(int(rng.pareto(1.4)) + 1, 2 if patient == 0 else 1), max_studies)
        members += [(patient, i) for i in range(count)]
        severities += list(0.6 * rng.normal() + 0.8 * rng.normal(size=count))
        patient += 1
    minimum = int(num_studies >= 3)
    num_positive = max(round(_POSITIVE * num_studies), minimum)
    num_normal = max(round(_NORMAL * num_studies), minimum)
    findings: list[Finding] = ["No Lung Opacity / Not Normal"] * num_studies
    order = np.argsort(severities[:num_studies])
    for i in order[:num_normal]:
        findings[i] = "Normal"
    for i in order[num_studies - num_positive :]:
        findings[i] = "Lung Opacity"
    studies = [_draw_study(seed, *members[i], finding) for i, finding in enumerate(findings)]
    return tuple(sorted(studies, key=lambda study: study.name))


def generator(seed: int, *key: int) -> np.random.Generator:
    """A random generator that depends on `seed` and `key`: indices of patient, study, stream."""
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
        # About 1 % of the ages are typing errors, such as 151 in the real headers.
        age=int(rng.integers(148, 156)) if rng.random() < 0.01 else age,
        view="AP" if rng.random() < _AP[finding] else "PA",
        pixel_spacing_mm=float(rng.choice(_PIXEL_SPACINGS_MM, p=(0.34, 0.33, 0.2, 0.08, 0.05))),
        name=str(uuid.UUID(bytes=rng.bytes(16), version=4)),
    )
