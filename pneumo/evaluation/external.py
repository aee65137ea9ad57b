"""A model on another set than it was trained on: everything frozen, nothing chosen anew.

Thresholds and calibration are those of the run's own val. Both sets are resampled by patient,
independently, so a difference has an interval. What the sets' make-up explains is said beside it:
prevalence, case mix (standardised to the internal test), what the metadata alone achieves, how the
pictures differ (`set_shift`), and what recalibration on a part of the new patients would change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import name_age_band
from pneumo.errors import MetricError
from pneumo.evaluation.baselines import MetadataModel
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Resampled,
    Statistic,
    Weights,
    as_json,
    divide,
    first_less_second,
    resample,
)
from pneumo.evaluation.calibration import Scaling, fit_scaling
from pneumo.evaluation.metrics import auroc_statistic, brier_statistic
from pneumo.evaluation.operating_points import OperatingPoint, call_positive
from pneumo.evaluation.predictions import Predictions, name_each, sigmoid
from pneumo.evaluation.subgroups import count_rarer

RECALIBRATION_FRACTION = 0.2
"""Of the new set's patients: a new calibration is fitted on them, and evaluated on the others."""
CASE_MIX = ("view", "age", "sex")
_UNKNOWN_LIMIT = 0.5
"""A property that more of the studies of either set lack is no part of the case mix."""


@dataclass(frozen=True)
class Frozen:
    """What the run's evaluation chose on its own val."""

    points: Mapping[str, OperatingPoint]
    """Those that have a threshold, by name."""
    scaling: Scaling | None
    metadata: MetadataModel


@dataclass(frozen=True)
class Both:
    """One number on the internal test and on the external set."""

    internal: Estimate
    external: Estimate
    difference: Estimate
    """External less internal."""


@dataclass(frozen=True)
class SetSummary:
    """Who is in a set."""

    n: int
    positives: int
    patients: int

    @classmethod
    def of(cls, rows: Predictions) -> SetSummary:
        """That of predictions."""
        return cls(len(rows), int(rows.target.sum()), len(np.unique(rows.patient)))


@dataclass(frozen=True)
class Recalibration:
    """What a calibration fitted on a part of the new patients would change for the others."""

    fraction: float
    fitted_on: int
    """Studies that it was fitted on; they are not evaluated here."""
    evaluated_on: int
    slope: float | None
    intercept: float | None
    brier_before: Estimate
    brier_after: Estimate
    difference: Estimate
    """After less before; below 0 is better."""


@dataclass(frozen=True)
class CaseMix:
    """The external AUROC, weighted so that its cells are as frequent as in the internal test."""

    by: tuple[str, ...]
    """Of CASE_MIX those that both sets know."""
    covered: float
    """Fraction of the internal test whose cell occurs in the external set."""
    auroc: Estimate


@dataclass(frozen=True)
class ExternalEvaluation:
    """A run on one external set, beside its internal test."""

    internal: SetSummary
    external: SetSummary
    auroc: Both
    sensitivity: Mapping[str, Both]
    """By operating point."""
    specificity: Mapping[str, Both]
    brier: Both
    """Of the calibrated probabilities; of the network's own where the run has no calibration."""
    in_the_large: Both
    """Mean of the same probabilities less the fraction of positives."""
    metadata_auroc: Both
    """What view, sex, age and spacing alone achieve, fitted on the run's train."""
    case_mix: CaseMix
    recalibration: Recalibration

    def to_json(self) -> dict[str, Any]:
        """The set's object in metrics.json."""
        return dict(as_json(vars(self)))


def evaluate_external(
    internal: Predictions, external: Predictions, frozen: Frozen, *, resamples: int, seed: int
) -> ExternalEvaluation:
    """The run's test (`internal`) and another set, evaluated by what is frozen.

    Raises MetricError where a set has one class only, or a score that is no number.
    """
    mix, weights = _standardise(internal, external)
    inside, outside = (
        _resample(rows, _statistics(rows, frozen, w), resamples=resamples, seed=seed + i)
        for i, (rows, w) in enumerate(((internal, None), (external, weights)))
    )
    points = tuple(frozen.points)
    return ExternalEvaluation(
        internal=SetSummary.of(internal),
        external=SetSummary.of(external),
        auroc=_compare(inside, outside, "auroc"),
        sensitivity={name: _compare(inside, outside, f"sensitivity/{name}") for name in points},
        specificity={name: _compare(inside, outside, f"specificity/{name}") for name in points},
        brier=_compare(inside, outside, "brier"),
        in_the_large=_compare(inside, outside, "in_the_large"),
        metadata_auroc=_compare(inside, outside, "metadata"),
        case_mix=mix if weights is None else replace(mix, auroc=outside["standardised"].estimate()),
        recalibration=_recalibrate(external, frozen.scaling, resamples=resamples, seed=seed),
    )


def _statistics(rows: Predictions, frozen: Frozen, weights: Floats | None) -> dict[str, Statistic]:
    auroc = auroc_statistic(rows.target, rows.logit)
    probability = _calibrate(rows, frozen.scaling)
    positive = rows.target == 1
    found = {
        "auroc": auroc,
        "brier": brier_statistic(rows.target, probability),
        "in_the_large": _fraction(np.ones(len(rows)), probability - positive),
    }
    for name, point in frozen.points.items():
        called = call_positive(rows.logit, point.logit)
        found[f"sensitivity/{name}"] = _fraction(positive, called)
        found[f"specificity/{name}"] = _fraction(~positive, ~called)
    if frozen.metadata.pipeline is not None:
        found["metadata"] = auroc_statistic(rows.target, frozen.metadata.score(rows))
    if weights is not None:
        found["standardised"] = lambda drawn: auroc(drawn * weights[:, None])
    return found


def _resample(
    rows: Predictions, statistics: Mapping[str, Statistic], *, resamples: int, seed: int
) -> dict[str, Resampled]:
    """As a run's own evaluation has it: intervals rest on the patients of the rarer class."""
    few = dict.fromkeys(statistics, count_rarer(rows))
    return resample(rows.patient, statistics, resamples=resamples, seed=seed, independent=few)


def _calibrate(rows: Predictions, scaling: Scaling | None) -> Floats:
    return sigmoid(rows.logit) if scaling is None else scaling.apply(rows.logit)


def _fraction(part: npt.NDArray[Any], value: npt.NDArray[Any]) -> Statistic:
    """The weighted mean of `value` over the studies of `part`, both (N,)."""
    table = np.stack([part * value, part]).astype(np.float64)

    def statistic(weights: Weights) -> Floats:
        summed = table @ weights
        return divide(summed[0], summed[1])

    return statistic


def _compare(
    internal: Mapping[str, Resampled], external: Mapping[str, Resampled], name: str
) -> Both:
    if name not in internal or name not in external:
        return Both(*[Estimate.undefined("no metadata of train")] * 3)
    first, second = internal[name], external[name]
    independent = min(first.independent, second.independent)
    left_out = second.value[:, None] - first.jackknife, second.jackknife - first.value[:, None]
    gap = Resampled(
        second.value - first.value,
        second.drawn - first.drawn,
        independent,
        np.concatenate(left_out, axis=1),
    )
    return Both(first.estimate(), second.estimate(), gap.estimate())


# --- case mix -------------------------------------------------------------------------------------


def _standardise(internal: Predictions, external: Predictions) -> tuple[CaseMix, Floats | None]:
    """The case mix still without its AUROC, and each external study's weight."""
    columns = [_describe(rows) for rows in (internal, external)]
    by = tuple(
        name
        for name in CASE_MIX
        if all((column[name] == "").mean() <= _UNKNOWN_LIMIT for column in columns)
    )
    if not by:
        reason = "view, age and sex are unknown in one of the sets"
        return CaseMix((), 0.0, Estimate.undefined(reason)), None
    inside, outside = (
        np.array(["|".join(cell) for cell in zip(*(column[name] for name in by), strict=True)])
        for column in columns
    )
    names, counts = np.unique(inside, return_counts=True)
    wanted = dict(zip(names.tolist(), (counts / len(inside)).tolist(), strict=True))
    names, counts = np.unique(outside, return_counts=True)
    there = dict(zip(names.tolist(), (counts / len(outside)).tolist(), strict=True))
    weights = np.array([wanted.get(cell, 0.0) / there[cell] for cell in outside.tolist()])
    covered = sum(fraction for cell, fraction in wanted.items() if cell in there)
    classes = external.target[weights > 0]
    if len(np.unique(classes)) < 2:
        reason = "the cells that both sets have hold one class only"
        return CaseMix(by, covered, Estimate.undefined(reason)), None
    return CaseMix(by, covered, Estimate.undefined("not resampled")), weights


def _describe(rows: Predictions) -> dict[str, npt.NDArray[np.str_]]:
    bands = name_each(rows.age, lambda age: "" if np.isnan(age) else name_age_band(int(age)))
    return {"view": rows.view, "age": bands, "sex": rows.sex}


# --- recalibration --------------------------------------------------------------------------------


def _recalibrate(
    rows: Predictions, scaling: Scaling | None, *, resamples: int, seed: int
) -> Recalibration:
    """Platt's scaling on RECALIBRATION_FRACTION of the patients, drawn by the seed."""
    patients = np.unique(rows.patient)
    count = round(RECALIBRATION_FRACTION * len(patients))
    chosen = np.random.default_rng(seed).permutation(patients)[:count]
    is_part = np.isin(rows.patient, chosen)
    part, rest = rows.take(is_part), rows.take(~is_part)
    try:
        slope, intercept = fit_scaling("platt", part.target, part.logit)
        before = brier_statistic(rest.target, _calibrate(rest, scaling))
        after = brier_statistic(rest.target, sigmoid(slope * rest.logit + intercept))
        found = _resample(rest, {"before": before, "after": after}, resamples=resamples, seed=seed)
    except MetricError as error:
        nothing = [Estimate.undefined(str(error))] * 3
        return Recalibration(RECALIBRATION_FRACTION, len(part), len(rest), None, None, *nothing)
    change = found["after"].beside(found["before"]).derive(first_less_second)
    return Recalibration(
        RECALIBRATION_FRACTION,
        len(part),
        len(rest),
        float(slope),
        float(intercept),
        found["before"].estimate(),
        found["after"].estimate(),
        change.estimate(),
    )
