"""Which studies are shown with their Grad-CAM, and which ones the model gets wrong."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pneumo.evaluation.bootstrap import (
    WILSON,
    Estimate,
    as_json,
    divide,
    resample,
    sums_statistic,
    wilson,
    with_wilson,
)
from pneumo.evaluation.operating_points import call_positive

Outcome = Literal["tp", "fp", "fn", "tn"]


OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


ERRORS: tuple[Outcome, ...] = ("fp", "fn")


Why = Literal["most certain", "least certain", "drawn"]


@dataclass(frozen=True)
class GalleryChoice:
    """A study to show, and why this one."""

    row: int
    """Its place in the arrays it was chosen from."""
    why: Why


def choose_gallery(
    target: npt.NDArray[Any],
    logit: npt.NDArray[Any],
    threshold: float,
    *,
    per_outcome: int,
    seed: int,
) -> dict[Outcome, list[GalleryChoice]]:
    """Which studies to show, at most `per_outcome` of each outcome.

    A third are those that the model is most certain of, most certain first; a third those whose
    logit is nearest to the threshold, nearest first; the rest are drawn by `seed` from all
    others, so that the gallery is not of the extremes alone. All inputs (N,).
    """
    chosen: dict[Outcome, list[GalleryChoice]] = {}
    for number, outcome in enumerate(OUTCOMES):
        rows = _by_certainty(target, logit, threshold, outcome)
        num_most = min(-(-per_outcome // 3), len(rows))
        num_least = min(-(-(per_outcome - num_most) // 2), len(rows) - num_most)
        between = rows[num_most : len(rows) - num_least]
        # A generator per outcome: one outcome's number does not change another's draw.
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(between)[: per_outcome - num_most - num_least]
        parts: tuple[tuple[Why, npt.NDArray[np.intp]], ...] = (
            ("most certain", rows[:num_most]),
            ("least certain", rows[len(rows) - num_least :][::-1]),
            ("drawn", drawn),
        )
        chosen[outcome] = [GalleryChoice(int(row), why) for why, part in parts for row in part]
    return chosen


@dataclass(frozen=True)
class SampledStudy:
    """A study of a stratified sample."""

    row: int
    """Its place in the arrays it was drawn from."""
    drawn_of: int
    """Studies of its outcome and view."""


def draw_sample(
    target: npt.NDArray[Any],
    logit: npt.NDArray[Any],
    view: npt.NDArray[np.str_],
    threshold: float,
    *,
    per_stratum: int,
    seed: int,
) -> list[SampledStudy]:
    """At most `per_stratum` studies of each outcome and view, by outcome, then by view; drawn by
    `seed`. All inputs (N,)."""
    sample = []
    for i, outcome in enumerate(OUTCOMES):
        rows = np.sort(_by_certainty(target, logit, threshold, outcome))
        for k, name in enumerate(np.unique(view)):
            stratum = rows[view[rows] == name]
            # A generator per stratum: one's number does not change another's draw.
            drawn = np.random.default_rng([seed, i, k]).permutation(stratum)[:per_stratum]
            sample += [SampledStudy(int(row), len(stratum)) for row in drawn]
    return sample


def choose_errors(
    target: npt.NDArray[Any], logit: npt.NDArray[Any], threshold: float, *, count: int
) -> dict[Outcome, npt.NDArray[np.intp]]:
    """The false positives and the false negatives that the model is most certain of.

    Indices, at most `count` each, most certain first. All inputs (N,).
    """
    return {outcome: _by_certainty(target, logit, threshold, outcome)[:count] for outcome in ERRORS}


def _by_certainty(
    target: npt.NDArray[Any], logit: npt.NDArray[Any], threshold: float, outcome: Outcome
) -> npt.NDArray[np.intp]:
    """The rows of an outcome, farthest from the threshold first; ties in the order given."""
    is_called, is_positive = outcome in ("tp", "fp"), outcome in ("tp", "fn")
    called, positive = call_positive(logit, threshold), np.asarray(target) == 1
    rows = np.flatnonzero((called == is_called) & (positive == is_positive))
    certainty = logit[rows] if is_called else -logit[rows]
    return rows[np.argsort(-certainty, kind="stable")]


@dataclass(frozen=True)
class FindingErrors:
    """How the studies of one finding were called."""

    finding: str
    n: int
    called_positive: int
    errors: int
    """False negatives where the finding is a positive one, false positives elsewhere."""
    error_rate: Estimate
    """The fraction of errors, with an interval over patients."""
    wilson: Estimate
    """The same with Wilson's, which takes images as independent."""

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
    """The errors by finding, in the findings' alphabetical order. All arrays (N,)."""
    called = call_positive(logit, threshold)
    wrong = called != (np.asarray(target) == 1)
    names, code = np.unique(finding, return_inverse=True)
    sums = sums_statistic(code, len(names), wrong, np.ones(len(code)))
    found = resample(patient, {"sums": sums}, resamples=resamples, seed=seed)["sums"]
    rates = found.derive(lambda both: divide(both[: len(names)], both[len(names) :]))
    return [
        _estimate_errors(str(name), called[here], wrong[here], patient[here], rates.estimate(row))
        for row, name in enumerate(names)
        for here in (code == row,)
    ]


def _estimate_errors(
    finding: str,
    called: npt.NDArray[np.bool_],
    wrong: npt.NDArray[np.bool_],
    patient: npt.NDArray[np.str_],
    rate: Estimate,
) -> FindingErrors:
    n, errors = len(wrong), int(wrong.sum())
    fraction = errors / n
    rate = with_wilson(rate, len(np.unique(patient)))
    by_image = Estimate(fraction, *wilson(fraction, n), WILSON)
    return FindingErrors(finding, n, int(called.sum()), errors, rate, by_image)
