"""Which studies are shown with their Grad-CAM, and the errors by finding."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.bootstrap import divide, resample, sums_statistic
from pneumo.evaluation.estimates import (
    WILSON,
    Estimate,
    as_json,
    count_equal_patients,
    wilson,
    with_wilson,
)
from pneumo.evaluation.operating_points import call_positive

Outcome = Literal["tp", "fp", "fn", "tn"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ERRORS: tuple[Outcome, ...] = ("fp", "fn")
Why = Literal["most certain", "least certain", "random"]


@dataclass(frozen=True)
class ShownStudy:
    """A study to show, and why it was chosen."""

    row: int
    """Its index in the given arrays."""
    why: Why
    stratum_size: int | None = None
    """Of a stratified sample: number of studies of its outcome and view."""


def choose_gallery(
    target: npt.NDArray[Any],
    logit: npt.NDArray[Any],
    threshold: float,
    *,
    per_outcome: int,
    seed: int,
) -> dict[Outcome, list[ShownStudy]]:
    """Which studies to show, at most `per_outcome` of each outcome.

    A third are the studies whose logit is farthest from the threshold, farthest first; a third
    those whose logit is nearest to it, nearest first; the rest is a random sample of the others, so
    that not only extremes are shown. All arrays are (N,).
    """
    chosen: dict[Outcome, list[ShownStudy]] = {}
    for number, outcome in enumerate(OUTCOMES):
        rows = _by_certainty(target, logit, threshold, outcome)
        num_most = min(-(-per_outcome // 3), len(rows))
        num_least = min(-(-(per_outcome - num_most) // 2), len(rows) - num_most)
        between = rows[num_most : len(rows) - num_least]
        # A generator for each outcome: the sample of one does not depend on the others.
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(between)[: per_outcome - num_most - num_least]
        parts: tuple[tuple[Why, npt.NDArray[np.intp]], ...] = (
            ("most certain", rows[:num_most]),
            ("least certain", rows[len(rows) - num_least :][::-1]),
            ("random", drawn),
        )
        chosen[outcome] = [ShownStudy(int(row), why) for why, part in parts for row in part]
    return chosen


def sample_studies(
    target: npt.NDArray[Any],
    logit: npt.NDArray[Any],
    threshold: float,
    *,
    view: npt.NDArray[np.str_],
    per_stratum: int,
    seed: int,
) -> list[ShownStudy]:
    """A random sample of at most `per_stratum` studies of each outcome and view, sorted by outcome,
    then by view. All arrays are (N,)."""
    sample = []
    for i, outcome in enumerate(OUTCOMES):
        rows = np.sort(_by_certainty(target, logit, threshold, outcome))
        for k, name in enumerate(np.unique(view)):
            stratum = rows[view[rows] == name]
            # A generator for each stratum, as in choose_gallery.
            drawn = np.random.default_rng([seed, i, k]).permutation(stratum)[:per_stratum]
            sample += [ShownStudy(int(row), "random", len(stratum)) for row in drawn]
    return sample


def choose_errors(
    target: npt.NDArray[Any], logit: npt.NDArray[Any], threshold: float, *, count: int
) -> dict[Outcome, list[ShownStudy]]:
    """At most `count` false positives and as many false negatives, those whose logit is farthest
    from the threshold, farthest first. All arrays are (N,).
    """
    return {
        outcome: [
            ShownStudy(int(row), "most certain")
            for row in _by_certainty(target, logit, threshold, outcome)[:count]
        ]
        for outcome in ERRORS
    }


def _by_certainty(
    target: npt.NDArray[Any], logit: npt.NDArray[Any], threshold: float, outcome: Outcome
) -> npt.NDArray[np.intp]:
    """The rows of an outcome, farthest from the threshold first; ties in the given order."""
    is_called, is_positive = outcome in ("tp", "fp"), outcome in ("tp", "fn")
    called, positive = call_positive(logit, threshold), np.asarray(target) == 1
    rows = np.flatnonzero((called == is_called) & (positive == is_positive))
    certainty = logit[rows] if is_called else -logit[rows]
    return rows[np.argsort(-certainty, kind="stable")]


@dataclass(frozen=True)
class FindingErrors:
    """The errors on the studies of one finding."""

    finding: str
    n: int
    called_positive: int
    errors: int
    """False negatives of a positive finding, false positives of any other."""
    error_rate: Estimate
    """The fraction of errors, with an interval over patients."""
    wilson: Estimate
    """The same with Wilson's interval, which takes images as independent."""

    def to_json(self) -> dict[str, Any]:
        """All but the name of the finding."""
        return dict(as_json(self, leave_out={"finding"}))


def count_errors(
    finding: npt.NDArray[np.str_],
    target: npt.NDArray[Any],
    logit: npt.NDArray[Any],
    threshold: float,
    *,
    patient: npt.NDArray[np.str_],
    resamples: int,
    seed: int,
) -> list[FindingErrors]:
    """The errors by finding, in alphabetical order. All arrays are (N,)."""
    called = call_positive(logit, threshold)
    wrong = called != (np.asarray(target) == 1)
    names, code = np.unique(finding, return_inverse=True)
    sums = sums_statistic(code, len(names), wrong, np.ones(len(code)))
    num_patients = len(np.unique(patient))
    found = resample(
        patient, {"sums": sums}, resamples=resamples, seed=seed, effective_patients=num_patients
    )
    rates = found["sums"].derive(lambda both: divide(both[: len(names)], both[len(names) :]))
    counted = []
    for row, name in enumerate(names.tolist()):
        here = code == row
        n, errors = int(here.sum()), int(wrong[here].sum())
        own_patients = len(np.unique(patient[here]))
        size = count_equal_patients(patient[here])
        rate = replace(rates, effective_patients=size).estimate(row)
        by_image = Estimate(errors / n, *wilson(errors / n, n), WILSON)
        rate = with_wilson(rate, own_patients)
        counted.append(FindingErrors(name, n, int(called[here].sum()), errors, rate, by_image))
    return counted
