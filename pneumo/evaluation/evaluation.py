"""Predictions -> Evaluation: how good the model is, chosen on val and reported on test.

Thresholds and calibration come from val alone and are frozen before test is looked at. What can't
be computed (one class only, too few patients, a NaN from a diverged model) is null with a reason;
nothing is ever silently 0. `Evaluation.to_metrics` is metrics.json, the machine-readable result of
a run; docs/metrics.md describes it.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pneumo.config import EvaluateConfig
from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.baselines import (
    FEATURES,
    Baseline,
    Metadata,
    MetadataModel,
    SickerView,
    ViewBaseline,
    compare_with_metadata,
    compare_with_view,
    find_sicker_view,
    fit_metadata,
    metadata_statistics,
    view_statistics,
)
from pneumo.evaluation.bootstrap import (
    Estimate,
    Share,
    Statistics,
    StatisticSet,
    as_json,
    in_turn,
)
from pneumo.evaluation.calibration import Calibration, Scaling, calibrate
from pneumo.evaluation.decision_curve import (
    DecisionCurve,
    net_benefit_statistic,
    summarise_net_benefit,
)
from pneumo.evaluation.delong import delong
from pneumo.evaluation.metrics import Curve
from pneumo.evaluation.operating_points import (
    DECISION,
    AtPoint,
    Decision,
    OperatingPoint,
    choose_points,
    evaluate_points,
    outcomes_statistic,
)
from pneumo.evaluation.predictions import Predictions, find_fault
from pneumo.evaluation.reliability import (
    Reliability,
    describe_bins,
    recalibration_statistic,
    reliability_statistics,
    summarise_reliability,
)
from pneumo.evaluation.subgroups import (
    Subgroups,
    count_by_class,
    count_rarer,
    evaluate_subgroups,
    subgroup_statistics,
)

METRICS_SCHEMA_VERSION = 4


@dataclass(frozen=True)
class SplitEvaluation:
    """One split, evaluated."""

    split: str
    n: int
    positives: int
    patients: int | None
    """None where nobody knows who they are: intervals then resample images."""
    patients_by_class: tuple[int, int]
    """Who have a negative study, and who a positive one; images where nobody knows who they are."""
    fault: str | None
    """What is wrong with the predictions, so that nothing below has a value; None: nothing."""
    auroc: Estimate
    auroc_delong: Estimate
    auroc_delong_clustered: Estimate
    average_precision: Estimate
    sensitivity_at_specificity_90: Estimate
    """Read off the split's own ROC curve, at a threshold that nothing else uses."""
    log_loss: Estimate
    brier: Estimate
    at: Mapping[str, AtPoint]
    """By the operating point's name."""
    roc: Curve | None
    """Thresholds in logits; None where the split can't be ranked."""
    precision_recall: Curve | None
    before: Reliability
    """Of the probabilities as the network gives them."""
    after: Reliability
    """Of the calibrated ones."""
    decision_curve: DecisionCurve
    subgroups: Subgroups
    view: ViewBaseline
    metadata: Baseline

    @property
    def prevalence(self) -> float:
        """Fraction of positives; NaN of an empty split."""
        return self.positives / self.n if self.n else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The split's object in metrics.json, thresholded metrics at the decision point."""
        return {
            **as_json(self, leave_out={"split", "at", "before", "after"}),
            **self.at[DECISION].to_json(),
            "calibration": {"before": as_json(self.before), "after": as_json(self.after)},
        }


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model: chosen on `val`, reported on `test`."""

    points: Mapping[str, OperatingPoint]
    """DECISION, SCREENING and the standard ones."""
    calibration: Calibration
    metadata: MetadataModel
    predictions: Predictions
    """Those that were evaluated, with the calibrated probability filled in."""
    val: SplitEvaluation
    test: SplitEvaluation

    def decide(self, split: Literal["val", "test"]) -> Decision:
        """What calls a study of the split positive; nothing where its scores have a fault."""
        found = {"val": self.val, "test": self.test}[split]
        point, at = self.points[DECISION], found.at[DECISION]
        if at.reason is not None:
            return Decision(None, at.reason)
        return Decision(point.logit, calibrated=self.calibrate(point.logit))

    def calibrate(self, logit: float | None) -> float | None:
        """The calibrated probability of a logit; None where either is missing."""
        chosen = self.calibration.chosen
        return None if logit is None or chosen is None else float(chosen.apply(logit))

    def to_metrics(
        self,
        *,
        run: str,
        dataset: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The content of metrics.json.

        `run` names the run, `dataset` holds the manifest's digest and the unit of the split,
        `model` facts of the model (initialisation, epoch of the checkpoint). An
        estimate is {value, low, high, method}, null where undefined, with a `reason`; a count is a
        plain number.
        """
        return {
            "schema_version": METRICS_SCHEMA_VERSION,
            "run": run,
            "dataset": dict(dataset),
            "model": dict(model or {}),
            "operating_points": {
                name: {
                    "rule": point.rule,
                    "chosen_on": "val",
                    "threshold": point.threshold,
                    "threshold_logit": point.logit,
                    "threshold_calibrated": self.calibrate(point.logit),
                    **({} if point.reason is None else {"reason": point.reason}),
                    "val": self.val.at[name].to_json(),
                    "test": self.test.at[name].to_json(),
                }
                for name, point in self.points.items()
            },
            "calibration": self.calibration.to_json(),
            "baselines": {
                "metadata": {
                    "features": list(FEATURES),
                    "fitted_on": "train",
                    "n": self.metadata.n,
                    **({} if self.metadata.reason is None else {"reason": self.metadata.reason}),
                }
            },
            "val": self.val.to_json(),
            "test": self.test.to_json(),
        }


def evaluate(
    predictions: Predictions,
    *,
    config: EvaluateConfig,
    seed: int,
    train: Metadata | None = None,
    has_patients: bool = True,
    share: Share = in_turn,
) -> Evaluation:
    """Choose the operating points and the calibration on val, evaluate val and test with them.

    `predictions` holds both splits; others are left alone. `train` is what is known of the training
    studies besides their pixels, for the metadata baseline. `seed` draws the bootstrap's patients,
    who are the images themselves without `has_patients`. `share` computes the resamples.
    Never raises for degenerate predictions: see the reasons of the estimates.
    """
    val = predictions.subset("val")
    fault = find_fault(val)
    val = val.number_names()
    points = choose_points(val, config)
    calibration = calibrate(val, min_patients=config.min_patients, seed=seed)
    if fault is not None:
        points = {
            name: replace(point, logit=None, reason=f"val: {fault}")
            for name, point in points.items()
        }
        calibration = Calibration(None, None, None, None, f"val: {fault}")
    calibrated = replace(predictions, calibrated_probability=calibration.apply(predictions.logit))
    fitted = Fitted(points, calibration, fit_metadata(train), find_sicker_view(train))
    val_found, test_found = (
        evaluate_split(calibrated.subset(name), name, fitted, config=config, seed=seed, share=share)
        for name in ("val", "test")
    )
    if not has_patients:
        val_found, test_found = (replace(one, patients=None) for one in (val_found, test_found))
    return Evaluation(
        points=points,
        calibration=calibration,
        metadata=fitted.metadata,
        predictions=calibrated,
        val=val_found,
        test=test_found,
    )


@dataclass(frozen=True, eq=False)
class Fitted:
    """What is fitted before a split is evaluated."""

    points: Mapping[str, OperatingPoint]
    calibration: Calibration
    metadata: MetadataModel
    sicker_view: SickerView


def evaluate_split(
    rows: Predictions,
    split: str,
    fitted: Fitted,
    *,
    config: EvaluateConfig,
    seed: int,
    share: Share,
) -> SplitEvaluation:
    """Evaluate `rows`, all of one split, by what is already fitted."""
    fault = find_fault(rows)
    # Sorted, so that what walks along the scores of a class walks along the memory.
    rows = rows.take(np.lexsort((rows.logit, rows.target))).number_names()
    threshold = fitted.points[DECISION].logit
    found = _resample(rows, fitted, fault, config, seed=seed, share=share)
    roc, precision_recall = _draw_curves(rows, fault)
    scores = rows.target, rows.logit
    before = _summarise_reliability(rows, found["before"], found["recalibration"], None)
    after, net_benefit = _evaluate_calibrated(rows, found, fitted.calibration)
    return SplitEvaluation(
        split=split,
        n=len(rows),
        positives=int(rows.target.sum()),
        patients=len(np.unique(rows.patient)),
        patients_by_class=count_by_class(rows),
        fault=fault,
        **{name: found["headlines"].estimate("values", i) for i, name in enumerate(_HEADLINES)},
        auroc_delong=Estimate.undefined(fault) if fault else delong(*scores),
        auroc_delong_clustered=Estimate.undefined(fault)
        if fault
        else delong(*scores, rows.patient),
        at=_evaluate_at_points(rows, fitted.points, found["points"]),
        roc=roc,
        precision_recall=precision_recall,
        log_loss=before.log_loss,
        brier=before.brier,
        before=before,
        after=after,
        decision_curve=net_benefit,
        subgroups=evaluate_subgroups(rows, threshold, found, config.min_patients),
        view=compare_with_view(rows, fitted.sicker_view, found),
        metadata=compare_with_metadata(rows, fitted.metadata, found),
    )


NUM_BINS = 10
"""Bins of equal number in the reliability curve and the calibration error."""
_HEADLINES = ("auroc", "average_precision", "sensitivity_at_specificity_90")


def _resample(
    rows: Predictions,
    fitted: Fitted,
    fault: str | None,
    config: EvaluateConfig,
    *,
    seed: int,
    share: Share,
) -> dict[str, StatisticSet]:
    """All that needs the bootstrap, in one pass over the same resamples."""
    scores = rows.target, rows.logit
    scaling = fitted.calibration.chosen
    threshold, fewest = fitted.points[DECISION].logit, config.min_patients
    sets: Statistics = {
        "headlines": lambda: {"values": metrics.headline_statistic(*scores, 0.9)},
        "points": lambda: {"outcomes": outcomes_statistic(rows, fitted.points)},
        "recalibration": lambda: {"fit": recalibration_statistic(*scores)},
        "before": lambda: reliability_statistics(*scores, None, NUM_BINS),
        "after": lambda: reliability_statistics(*scores, scaling, NUM_BINS),
        "net_benefit": lambda: {"curve": net_benefit_statistic(rows)},
        **subgroup_statistics(rows, threshold, fewest),
        **view_statistics(rows, fitted.sicker_view, fewest),
        **metadata_statistics(rows, fitted.metadata, fewest),
    }
    if fault is not None:
        return dict.fromkeys(sets, StatisticSet({}, fault))
    return bootstrap.resample_sets(
        rows.patient,
        sets,
        resamples=config.bootstrap_resamples,
        seed=seed,
        independent=dict.fromkeys(sets, count_rarer(rows)),
        share=share,
    )


def _evaluate_at_points(
    rows: Predictions, points: Mapping[str, OperatingPoint], part: StatisticSet
) -> dict[str, AtPoint]:
    if part.reason is None:
        return evaluate_points(rows, points, part.resampled["outcomes"])
    return {
        name: AtPoint.undefined(
            part.reason if point.logit is not None else f"no threshold: {point.reason}"
        )
        for name, point in points.items()
    }


def _summarise_reliability(
    rows: Predictions,
    part: StatisticSet,
    recalibration: StatisticSet,
    scaling: Scaling | None,
) -> Reliability:
    if part.reason is not None:
        return Reliability.undefined(part.reason)
    facts = describe_bins(rows, scaling, NUM_BINS)
    return summarise_reliability(part.resampled, recalibration, facts, scaling)


def _evaluate_calibrated(
    rows: Predictions, found: Mapping[str, StatisticSet], calibration: Calibration
) -> tuple[Reliability, DecisionCurve]:
    """What needs the calibrated probabilities."""
    if calibration.chosen is None:
        reason = f"no calibration: {calibration.reason}"
        return Reliability.undefined(reason), DecisionCurve.undefined(reason)
    after = _summarise_reliability(rows, found["after"], found["recalibration"], calibration.chosen)
    part = found["net_benefit"]
    if part.reason is not None:
        return after, DecisionCurve.undefined(part.reason)
    return after, summarise_net_benefit(part.resampled["curve"], rows)


def _draw_curves(rows: Predictions, fault: str | None) -> tuple[Curve | None, Curve | None]:
    if fault is not None:
        return None, None
    with contextlib.suppress(MetricError):  # auroc carries the reason
        return (
            metrics.roc_points(rows.target, rows.logit),
            metrics.precision_recall_points(rows.target, rows.logit),
        )
    return None, None
