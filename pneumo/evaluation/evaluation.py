"""Predictions -> Evaluation: how good the model is, chosen on val and reported on test.

Thresholds and calibration come from val alone and are frozen before test is evaluated. What can't
be computed (one class only, too few patients, a NaN from a diverged model) is None with a reason,
never 0. `Evaluation.to_metrics` is metrics.json, the machine-readable result of a run;
docs/metrics.md describes it.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo.config import EvaluateConfig
from pneumo.errors import MetricError
from pneumo.evaluation import (
    baselines,
    bootstrap,
    decision_curve,
    metrics,
    operating_points,
    ranking,
    reliability,
    subgroups,
)
from pneumo.evaluation.baselines import Baseline, Metadata, MetadataModel, SickerView, ViewBaseline
from pneumo.evaluation.bootstrap import MapBlocks, StatisticBuilders, StatisticSet
from pneumo.evaluation.calibration import Calibration, calibrate
from pneumo.evaluation.decision_curve import DecisionCurve
from pneumo.evaluation.delong import delong
from pneumo.evaluation.estimates import Estimate, Floats, as_json
from pneumo.evaluation.logistic_regression import LogitSample, recalibration_statistic
from pneumo.evaluation.metrics import Curve
from pneumo.evaluation.operating_points import DECISION, Decision, OperatingPoint, PointEvaluation
from pneumo.evaluation.predictions import Predictions, find_fault
from pneumo.evaluation.reliability import Reliability
from pneumo.evaluation.subgroups import Subgroups

METRICS_SCHEMA_VERSION = 4


@dataclass(frozen=True)
class SplitEvaluation:
    """The evaluation of one split."""

    split: str
    n: int
    positives: int
    patients: int | None
    """None where patients are unknown: intervals then resample images."""
    patients_by_class: tuple[int, int]
    """Patients with a negative study, and with a positive one; images where patients are
    unknown."""
    fault: str | None
    """Why the predictions are unusable, so that nothing below has a value; None where they are
    usable."""
    auroc: Estimate
    auroc_delong: Estimate
    auroc_delong_clustered: Estimate
    average_precision: Estimate
    sensitivity_at_specificity_90: Estimate
    """From the split's own ROC curve; its threshold is used for nothing else."""
    log_loss: Estimate
    brier: Estimate
    at: Mapping[str, PointEvaluation]
    """By the operating point's name."""
    roc: Curve | None
    """Thresholds in logits; None where the split can't be ranked."""
    precision_recall: Curve | None
    before: Reliability
    """Of the network's probabilities."""
    after: Reliability
    """Of the calibrated probabilities."""
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
    """The evaluation of a model: chosen on `val`, reported on `test`."""

    points: Mapping[str, OperatingPoint]
    """DECISION, SCREENING and the STANDARD points, by name."""
    calibration: Calibration
    metadata: MetadataModel
    predictions: Predictions
    """With the calibrated probabilities."""
    val: SplitEvaluation
    test: SplitEvaluation

    def decide(self, split: str) -> Decision:
        """The threshold that calls a study of the split ('val' or 'test') positive; none where its
        predictions are unusable."""
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

        `run` is the run's name, `dataset` has the manifest's digest and the unit of the split,
        `model` has facts of the model (initialisation, epoch of the checkpoint). An estimate is
        {value, low, high, method}, null with a `reason` where undefined; a count is a number.
        """
        return {
            "schema_version": METRICS_SCHEMA_VERSION,
            "run": run,
            "dataset": dict(dataset),
            "model": dict(model or {}),
            "operating_points": {name: self._describe_point(name) for name in self.points},
            "calibration": self.calibration.to_json(),
            "baselines": {
                "metadata": {
                    "features": list(baselines.FEATURES),
                    "fitted_on": "train",
                    "n": self.metadata.n,
                    **({} if self.metadata.reason is None else {"reason": self.metadata.reason}),
                }
            },
            "val": self.val.to_json(),
            "test": self.test.to_json(),
        }

    def _describe_point(self, name: str) -> dict[str, Any]:
        """An operating point's object in metrics.json."""
        point = self.points[name]
        return {
            "rule": point.rule,
            "chosen_on": "val",
            "threshold": point.threshold,
            "threshold_logit": point.logit,
            "threshold_calibrated": self.calibrate(point.logit),
            **({} if point.reason is None else {"reason": point.reason}),
            "val": self.val.at[name].to_json(),
            "test": self.test.at[name].to_json(),
        }


@dataclass(frozen=True, eq=False)
class Fitted:
    """What is fitted on train and val, before a split is evaluated."""

    points: Mapping[str, OperatingPoint]
    calibration: Calibration
    metadata: MetadataModel
    sicker_view: SickerView

    @property
    def threshold(self) -> float | None:
        """The decision point's, on the logit."""
        return self.points[DECISION].logit


def evaluate(
    predictions: Predictions,
    *,
    config: EvaluateConfig,
    seed: int,
    train: Metadata | None = None,
    has_patients: bool = True,
    map_blocks: MapBlocks = map,
) -> Evaluation:
    """Choose the operating points and the calibration on val, evaluate val and test with them.

    `predictions` holds both splits; other splits are ignored. `train` is what is known of the
    training studies besides their pixels, for the baselines. `seed` draws the patients of the
    bootstrap; without `has_patients` each image counts as a patient. `map_blocks` computes the
    resamples. Never raises for degenerate predictions: see the reasons of the estimates.
    """
    fitted = _fit(predictions.subset("val"), train, config, seed)
    probability = fitted.calibration.apply(predictions.logit)
    calibrated = replace(predictions, calibrated_probability=probability)
    val, test = (
        evaluate_split(
            calibrated.subset(name), name, fitted, config=config, seed=seed, map_blocks=map_blocks
        )
        for name in ("val", "test")
    )
    if not has_patients:
        val, test = (replace(one, patients=None) for one in (val, test))
    return Evaluation(
        points=fitted.points,
        calibration=fitted.calibration,
        metadata=fitted.metadata,
        predictions=calibrated,
        val=val,
        test=test,
    )


def _fit(val: Predictions, train: Metadata | None, config: EvaluateConfig, seed: int) -> Fitted:
    fault = find_fault(val)
    val = val.with_integer_keys()
    points = operating_points.choose_points(val, config)
    calibration = calibrate(val, min_patients=config.min_patients, seed=seed)
    if fault is not None:
        reason = f"val: {fault}"
        points = {n: replace(point, logit=None, reason=reason) for n, point in points.items()}
        calibration = Calibration(None, None, None, None, reason)
    return Fitted(
        points, calibration, baselines.fit_metadata(train), baselines.find_sicker_view(train)
    )


def evaluate_split(
    rows: Predictions,
    split: str,
    fitted: Fitted,
    *,
    config: EvaluateConfig,
    seed: int,
    map_blocks: MapBlocks = map,
) -> SplitEvaluation:
    """Evaluate `rows`, all of one split, with what is already fitted."""
    fault = find_fault(rows)
    # Sorted by class and score, so that the rankings read the memory in order.
    rows = rows.take(np.lexsort((rows.logit, rows.target))).with_integer_keys()
    metadata_score = functools.cache(lambda: fitted.metadata.score(rows))
    found = _resample(rows, fitted, metadata_score, fault, config, seed=seed, map_blocks=map_blocks)
    roc, precision_recall = _find_curves(rows, fault)
    recalibration, scaling = found["recalibration"], fitted.calibration.chosen
    before = reliability.evaluate_reliability(rows, None, found["before"], recalibration)
    return SplitEvaluation(
        split=split,
        n=len(rows),
        positives=int(rows.target.sum()),
        patients=len(np.unique(rows.patient)),
        patients_by_class=rows.count_by_class(),
        fault=fault,
        **{name: found["headlines"].estimate("values", i) for i, name in enumerate(_HEADLINES)},
        auroc_delong=_delong(rows, fault),
        auroc_delong_clustered=_delong(rows, fault, rows.patient),
        at=operating_points.evaluate_points(rows, fitted.points, found["points"]),
        roc=roc,
        precision_recall=precision_recall,
        log_loss=before.log_loss,
        brier=before.brier,
        before=before,
        after=reliability.evaluate_reliability(rows, scaling, found["after"], recalibration),
        decision_curve=decision_curve.summarise_net_benefit(rows, found["net_benefit"]),
        subgroups=subgroups.evaluate_subgroups(rows, fitted.threshold, found, config.min_patients),
        view=baselines.compare_with_view(rows, fitted.sicker_view, found),
        metadata=baselines.compare_with_metadata(rows, metadata_score, found),
    )


_HEADLINES = ("auroc", "average_precision", "sensitivity_at_specificity_90")


def _resample(
    rows: Predictions,
    fitted: Fitted,
    metadata_score: Callable[[], Floats],
    fault: str | None,
    config: EvaluateConfig,
    *,
    seed: int,
    map_blocks: MapBlocks,
) -> dict[str, StatisticSet]:
    """All that needs the bootstrap, in one pass over the same resamples."""
    scores = rows.target, rows.logit
    scaling, min_patients = fitted.calibration.chosen, config.min_patients
    sample = functools.cache(lambda: LogitSample.of(*scores, scaling.slope if scaling else 1.0))
    sets: StatisticBuilders = {
        "headlines": lambda: {"values": ranking.headline_statistic(*scores, 0.9)},
        "points": lambda: {"outcomes": operating_points.outcomes_statistic(rows, fitted.points)},
        "recalibration": lambda: {"fit": recalibration_statistic(sample())},
        "before": lambda: reliability.reliability_statistics(sample(), None),
        "after": lambda: reliability.reliability_statistics(sample(), scaling),
        "net_benefit": lambda: {"curve": decision_curve.net_benefit_statistic(rows)},
        **subgroups.subgroup_statistics(rows, fitted.threshold, min_patients),
        **baselines.view_statistics(rows, fitted.sicker_view, min_patients),
        **baselines.metadata_statistics(rows, metadata_score, min_patients),
    }
    without = {} if fault is None else dict.fromkeys(sets, StatisticSet({}, fault))
    if scaling is None:
        reason = f"no calibration: {fitted.calibration.reason}"
        without |= dict.fromkeys(("after", "net_benefit"), StatisticSet({}, reason))
    found = bootstrap.resample_sets(
        rows.patient,
        {name: build for name, build in sets.items() if name not in without},
        resamples=config.bootstrap_resamples,
        seed=seed,
        effective_patients=rows.count_rarer_class(),
        map_blocks=map_blocks,
    )
    return found | without


def _delong(
    rows: Predictions, fault: str | None, patient: npt.NDArray[Any] | None = None
) -> Estimate:
    return Estimate.undefined(fault) if fault else delong(rows.target, rows.logit, patient)


def _find_curves(rows: Predictions, fault: str | None) -> tuple[Curve | None, Curve | None]:
    if fault is not None:
        return None, None
    with contextlib.suppress(MetricError):  # auroc carries the reason
        return (
            metrics.roc_points(rows.target, rows.logit),
            metrics.precision_recall_points(rows.target, rows.logit),
        )
    return None, None
