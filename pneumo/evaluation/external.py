"""External validation: a model on another data set, with everything frozen.

Thresholds and calibration are those of the run's own val. The internal test and the external set
are resampled by patient, independently, so a difference has an interval. Beside it stands what the
composition of the sets explains: prevalence, case mix (standardised to the internal test), what the
metadata alone achieves, how the images differ (`set_shift`), and what recalibration on a part of
the new patients would change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pneumo.dataset.quality import name_age_band
from pneumo.errors import MetricError
from pneumo.evaluation.baselines import MetadataModel
from pneumo.evaluation.bootstrap import (
    MapBlocks,
    Resampled,
    Statistic,
    first_minus_second,
    resample,
)
from pneumo.evaluation.calibration import NOT_RANKED, Scaling, fit_scaling
from pneumo.evaluation.estimates import (
    Estimate,
    Floats,
    count_equal_patients,
    subtract,
    with_wilson,
)
from pneumo.evaluation.metrics import brier_statistic, mean_of_known_statistic
from pneumo.evaluation.operating_points import OperatingPoint, call_positive, check_enough
from pneumo.evaluation.predictions import Predictions, name_each, sigmoid
from pneumo.evaluation.ranking import auroc_statistic

RECALIBRATION_FRACTION = 0.2
"""Fraction of the external patients on whom a new calibration is fitted; it is evaluated on the
others."""
CASE_MIX = ("view", "age", "sex")
_UNKNOWN_LIMIT = 0.5
"""A property that is unknown in a larger fraction of either set is not part of the case mix."""


@dataclass(frozen=True)
class FrozenChoices:
    """What is fixed before the external set is evaluated."""

    points: Mapping[str, OperatingPoint]
    """Operating points with a threshold, by name."""
    scaling: Scaling | None
    metadata: MetadataModel


@dataclass(frozen=True)
class TwoSetEstimate:
    """A metric on the internal test and on the external set."""

    internal: Estimate
    external: Estimate
    difference: Estimate
    """External minus internal."""


@dataclass(frozen=True)
class SetSummary:
    """Size of a set."""

    n: int
    positives: int
    patients: int | None
    """None where patients are unknown, and each image counts as one."""

    @classmethod
    def of(cls, rows: Predictions, *, has_patients: bool) -> SetSummary:
        """The size of a set of predictions."""
        patients = len(np.unique(rows.patient)) if has_patients else None
        return cls(len(rows), int(rows.target.sum()), patients)


@dataclass(frozen=True)
class Recalibration:
    """The effect of a calibration fitted on some external patients, on the others."""

    fraction: float
    fitted_on: int
    """Number of studies; they are not evaluated here."""
    evaluated_on: int
    slope: float | None
    intercept: float | None
    brier_before: Estimate
    brier_after: Estimate
    difference: Estimate
    """After minus before; below 0 is better."""


@dataclass(frozen=True)
class CaseMix:
    """The external AUROC, standardised: studies are weighted so that each combination of the
    properties is as frequent as in the internal test."""

    by: tuple[str, ...]
    """The properties of CASE_MIX that are known in both sets."""
    covered: float
    """Fraction of the internal test whose combination occurs with both classes in the external
    set; other combinations have no weight."""
    auroc: Estimate


@dataclass(frozen=True)
class ExternalEvaluation:
    """A run on one external set, and on its internal test."""

    internal: SetSummary
    external: SetSummary
    auroc: TwoSetEstimate
    sensitivity: Mapping[str, TwoSetEstimate]
    """By operating point."""
    specificity: Mapping[str, TwoSetEstimate]
    brier: TwoSetEstimate
    """Of the calibrated probabilities; of the network's own without a calibration."""
    in_the_large: TwoSetEstimate
    """Mean of the same probabilities minus the fraction of positives."""
    metadata_auroc: TwoSetEstimate
    """Of view, sex, age and spacing alone, fitted on the run's train."""
    case_mix: CaseMix
    recalibration: Recalibration


def evaluate_external(
    internal: Predictions,
    external: Predictions,
    frozen: FrozenChoices,
    *,
    resamples: int,
    seed: int,
    min_patients: int,
    has_patients: tuple[bool, bool] = (True, True),
    map_blocks: MapBlocks = map,
) -> ExternalEvaluation:
    """Evaluate the run's test (`internal`) and another set with the frozen choices.

    Case mix and recalibration need `min_patients` patients of a class; `has_patients` says of both
    sets whether patients are known, `map_blocks` computes the resamples.

    Raises MetricError where a set has one class only, or a score is NaN or infinite.
    """
    mix, weights, size = _standardise(internal, external, min_patients)

    def resample_patients(
        rows: Predictions, statistics: Mapping[str, Statistic], seed: int
    ) -> dict[str, Resampled]:
        # As in a run's own evaluation: intervals depend on the patients of the rarer class.
        return resample(
            rows.patient,
            statistics,
            resamples=resamples,
            seed=seed,
            effective_patients=rows.count_rarer_class(),
            map_blocks=map_blocks,
        )

    inside = resample_patients(internal, _statistics(internal, frozen, None), seed)
    outside = resample_patients(external, _statistics(external, frozen, weights), seed + 1)
    if weights is not None:
        standardised = replace(outside["standardised"], effective_patients=size)
        mix = replace(mix, auroc=standardised.estimate())
    points = tuple(frozen.points)

    def compare_rates(name: str, of_class: int) -> TwoSetEstimate:
        def resize(found: Mapping[str, Resampled], rows: Predictions) -> dict[str, Resampled]:
            size = rows.count_equal_patients(rows.target == of_class)
            return {name: replace(found[name], effective_patients=size)}

        both = _compare(resize(inside, internal), resize(outside, external), name)
        return _with_wilson(both, *(s.count_by_class()[of_class] for s in (internal, external)))

    return ExternalEvaluation(
        internal=SetSummary.of(internal, has_patients=has_patients[0]),
        external=SetSummary.of(external, has_patients=has_patients[1]),
        auroc=_compare(inside, outside, "auroc"),
        sensitivity={name: compare_rates(f"sensitivity/{name}", 1) for name in points},
        specificity={name: compare_rates(f"specificity/{name}", 0) for name in points},
        brier=_compare(inside, outside, "brier"),
        in_the_large=_compare(inside, outside, "in_the_large"),
        metadata_auroc=_compare(inside, outside, "metadata"),
        case_mix=mix,
        recalibration=_recalibrate(external, frozen.scaling, resample_patients, seed, min_patients),
    )


def _statistics(
    rows: Predictions, frozen: FrozenChoices, weights: Floats | None
) -> dict[str, Statistic]:
    auroc = auroc_statistic(rows.target, rows.logit)
    probability = _calibrate(rows, frozen.scaling)
    positive = rows.target == 1
    found = {
        "auroc": auroc,
        "brier": brier_statistic(rows.target, probability),
        "in_the_large": mean_of_known_statistic(probability - positive),
    }
    for name, point in frozen.points.items():
        called = call_positive(rows.logit, point.logit)
        found[f"sensitivity/{name}"] = mean_of_known_statistic(np.where(positive, called, np.nan))
        found[f"specificity/{name}"] = mean_of_known_statistic(np.where(positive, np.nan, ~called))
    if frozen.metadata.pipeline is not None:
        found["metadata"] = auroc_statistic(rows.target, frozen.metadata.score(rows))
    if weights is not None:
        found["standardised"] = lambda drawn: auroc(drawn * weights[:, None])
    return found


def _calibrate(rows: Predictions, scaling: Scaling | None) -> Floats:
    return sigmoid(rows.logit) if scaling is None else scaling.apply(rows.logit)


def _compare(
    internal: Mapping[str, Resampled], external: Mapping[str, Resampled], name: str
) -> TwoSetEstimate:
    if name not in internal or name not in external:
        return TwoSetEstimate(*[Estimate.undefined("no metadata of train")] * 3)
    first, second = internal[name], external[name]
    left_out = second.value[:, None] - first.jackknife, second.jackknife - first.value[:, None]
    gap = Resampled(
        second.value - first.value,
        second.drawn - first.drawn,
        min(first.effective_patients, second.effective_patients),
        np.concatenate(left_out, axis=1),
    )
    return TwoSetEstimate(first.estimate(), second.estimate(), gap.estimate())


def _with_wilson(both: TwoSetEstimate, *num_patients: int) -> TwoSetEstimate:
    """A proportion of so many patients: one of exactly 0 or 1 never varies under resampling."""
    sides = both.internal, both.external
    own, here = (with_wilson(side, n) for side, n in zip(sides, num_patients, strict=True))
    if (own, here) == sides:
        return both
    return TwoSetEstimate(own, here, subtract(here, own))


# --- case mix -------------------------------------------------------------------------------------


def _standardise(
    internal: Predictions, external: Predictions, min_patients: int
) -> tuple[CaseMix, Floats | None, int]:
    """The case mix, without its AUROC; the weight of each external study, and to how many patients
    with equal weights those of the rarer class amount."""
    columns = [_describe(rows) for rows in (internal, external)]
    by = tuple(
        name
        for name in CASE_MIX
        if all((column[name] == "").mean() <= _UNKNOWN_LIMIT for column in columns)
    )
    if not by:
        reason = "view, age and sex are unknown in one of the sets"
        return CaseMix((), 0.0, Estimate.undefined(reason)), None, 0
    inside, outside = (
        np.array(["|".join(cell) for cell in zip(*(column[name] for name in by), strict=True)])
        for column in columns
    )
    # A combination of one class would be compared with other combinations only.
    positive = external.target == 1
    usable = np.intersect1d(outside[positive], outside[~positive])
    wanted, there = _frequencies(inside), _frequencies(outside)
    weights = np.array(
        [wanted.get(cell, 0.0) / there[cell] for cell in outside.tolist()]
    ) * np.isin(outside, usable)
    covered = float(np.isin(inside, usable).mean())
    size = min(
        count_equal_patients(external.patient, weights * part) for part in (positive, ~positive)
    )
    if size < min_patients:
        reason = f"the weighted patients of a class are worth {size}, {min_patients} are needed"
        return CaseMix(by, covered, Estimate.undefined(reason)), None, 0
    return CaseMix(by, covered, Estimate.undefined("not resampled")), weights, size


def _frequencies(cells: npt.NDArray[np.str_]) -> dict[str, float]:
    names, counts = np.unique(cells, return_counts=True)
    return dict(zip(names.tolist(), (counts / len(cells)).tolist(), strict=True))


def _describe(rows: Predictions) -> dict[str, npt.NDArray[np.str_]]:
    bands = name_each(rows.age, lambda age: "" if np.isnan(age) else name_age_band(int(age)))
    return {"view": rows.view, "age": bands, "sex": rows.sex}


# --- recalibration --------------------------------------------------------------------------------


def _recalibrate(
    rows: Predictions,
    scaling: Scaling | None,
    resample_patients: Callable[[Predictions, Mapping[str, Statistic], int], dict[str, Resampled]],
    seed: int,
    min_patients: int,
) -> Recalibration:
    """Platt scaling on RECALIBRATION_FRACTION of the patients, a random sample."""
    patients = np.unique(rows.patient)
    count = round(RECALIBRATION_FRACTION * len(patients))
    chosen = np.random.default_rng(seed).permutation(patients)[:count]
    is_part = np.isin(rows.patient, chosen)
    part, rest = rows.take(is_part), rows.take(~is_part)
    try:
        slope, intercept = _fit_platt(part, min_patients)
        before = brier_statistic(rest.target, _calibrate(rest, scaling))
        after = brier_statistic(rest.target, sigmoid(slope * rest.logit + intercept))
        found = resample_patients(rest, {"before": before, "after": after}, seed)
    except MetricError as error:
        nothing = [Estimate.undefined(str(error))] * 3
        return Recalibration(RECALIBRATION_FRACTION, len(part), len(rest), None, None, *nothing)
    change = found["after"].concatenate(found["before"]).derive(first_minus_second)
    estimates = (one.estimate() for one in (found["before"], found["after"], change))
    return Recalibration(RECALIBRATION_FRACTION, len(part), len(rest), slope, intercept, *estimates)


def _fit_platt(part: Predictions, min_patients: int) -> tuple[float, float]:
    """Slope and intercept; raises MetricError where a run's own val would not be used either."""
    check_enough(part, "youden", min_patients)
    slope, intercept = fit_scaling("platt", part.target, part.logit)
    if slope <= 0:
        raise MetricError(NOT_RANKED)
    return slope, intercept
