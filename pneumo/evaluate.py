"""Predictions -> Evaluation: what the model is worth, decided on val and reported on test.

Thresholds come from val alone and are frozen before test is looked at. What can't be computed (one
class only, too few patients, a NaN from a diverged model) is null with a reason; nothing is ever
silently 0. `Evaluation.to_metrics` is metrics.json, the machine-readable result of a run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pneumo import metrics
from pneumo.config import EvaluateConfig
from pneumo.errors import DataError, MetricError
from pneumo.metrics import Confusion, Curve, Estimate
from pneumo.predict import Predictions

METRICS_SCHEMA_VERSION = 1

DECISION = "decision"
"""The operating point that headline numbers are given at."""
SCREENING = "screening"
"""The operating point that keeps `evaluate.sensitivity` on val."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on the probability, chosen on val; `threshold` is None where val gives none."""

    name: str
    rule: str
    """In words, such as `sensitivity >= 0.90`."""
    threshold: float | None
    reason: str | None = None


@dataclass(frozen=True)
class AtPoint:
    """A split at an operating point."""

    counts: Confusion | None
    """None where there is no threshold or the split can't be judged."""
    rates: Mapping[str, Estimate]
    """accuracy, precision, recall, specificity, npv, f1, mcc."""

    def to_json(self) -> dict[str, Any]:
        """The rates by name, and `confusion`: four counts or null."""
        return {
            **{name: estimate.to_json() for name, estimate in self.rates.items()},
            "confusion": None if self.counts is None else self.counts.to_json(),
        }


@dataclass(frozen=True)
class ViewBaseline:
    """How far the view alone gets: portable AP images are of sicker patients (no pixel needed)."""

    n: int
    """Studies whose view is known."""
    view_only: Estimate
    """AUROC of AP = 1, PA = 0."""
    model: Estimate
    """The model's AUROC on the same studies."""
    gain: Estimate
    """model - view_only, over the same resamples."""
    within: Mapping[str, Estimate]
    """The model's AUROC within AP and within PA, where the view is of no help."""

    def to_json(self) -> dict[str, Any]:
        """The estimates and the count."""
        return {
            "n": self.n,
            "view_only_auroc": self.view_only.to_json(),
            "model_auroc": self.model.to_json(),
            "gain": self.gain.to_json(),
            **{f"auroc_within_{view}": found.to_json() for view, found in self.within.items()},
        }


@dataclass(frozen=True)
class SplitEvaluation:
    """One split, judged."""

    split: str
    n: int
    positives: int
    patients: int
    auroc: Estimate
    auroc_delong: Estimate
    average_precision: Estimate
    log_loss: Estimate
    brier: Estimate
    at: Mapping[str, AtPoint]
    """By the operating point's name."""
    roc: Curve | None
    """Thresholds in logits; None where the split can't be ranked."""
    precision_recall: Curve | None
    view: ViewBaseline

    @property
    def prevalence(self) -> float:
        """Share of positives; NaN of an empty split."""
        return self.positives / self.n if self.n else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The split's object in metrics.json, thresholded metrics at the decision point."""
        return {
            "n": self.n,
            "positives": self.positives,
            "patients": self.patients,
            "auroc": self.auroc.to_json(),
            "auroc_delong": self.auroc_delong.to_json(),
            "average_precision": self.average_precision.to_json(),
            **self.at[DECISION].to_json(),
            "log_loss": self.log_loss.to_json(),
            "brier": self.brier.to_json(),
            "view": self.view.to_json(),
        }


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model: chosen on `val`, reported on `test`."""

    points: Mapping[str, OperatingPoint]
    """DECISION and SCREENING."""
    val: SplitEvaluation
    test: SplitEvaluation

    def to_metrics(
        self,
        *,
        run: str,
        dataset: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The content of metrics.json.

        `run` names the run, `dataset` holds the manifest's digest and the unit of the split,
        `model` what is worth knowing of the model (initialisation, epoch of the checkpoint). An
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
                    **({} if point.reason is None else {"reason": point.reason}),
                    "val": self.val.at[name].to_json(),
                    "test": self.test.at[name].to_json(),
                }
                for name, point in self.points.items()
            },
            "val": self.val.to_json(),
            "test": self.test.to_json(),
        }


def check_complete(predictions: Predictions, expected: Mapping[str, int]) -> None:
    """That every study was scored exactly once; `expected` is the manifest's count of each split.

    Raises DataError for a duplicate, a missing or a surplus study.
    """
    duplicates = len(predictions) - len(np.unique(predictions.key))
    if duplicates:
        raise DataError(
            f"predictions: {duplicates} studies are scored more than once; "
            "each must count exactly once"
        )
    found = {name: int((predictions.split == name).sum()) for name in expected}
    wrong = [
        f"{name}: {found[name]} scored, {expected[name]} in the manifest"
        for name in expected
        if found[name] != expected[name]
    ]
    surplus = len(predictions) - sum(found.values())
    if surplus:
        wrong.append(f"{surplus} of a split that was not asked for")
    if wrong:
        raise DataError(f"predictions are incomplete: {'; '.join(wrong)}")


def evaluate(predictions: Predictions, *, config: EvaluateConfig, seed: int) -> Evaluation:
    """Choose the operating points on val, judge val and test at them.

    `predictions` holds both splits; others are left alone. `seed` draws the bootstrap's patients.
    Never raises for degenerate predictions: see the reasons of the estimates.
    """
    val = predictions.subset("val")
    points = {
        DECISION: _choose(DECISION, val, config.operating_point, config.sensitivity),
        SCREENING: _choose(SCREENING, val, "sensitivity", config.sensitivity),
    }
    resamples = config.bootstrap_resamples
    return Evaluation(
        points=points,
        val=evaluate_split(val, "val", points, resamples=resamples, seed=seed),
        test=evaluate_split(
            predictions.subset("test"), "test", points, resamples=resamples, seed=seed
        ),
    )


def _choose(name: str, val: Predictions, rule: str, sensitivity: float) -> OperatingPoint:
    words = "Youden's index" if rule == "youden" else f"sensitivity ≥ {sensitivity:.2f}"
    try:
        if rule == "youden":
            threshold = metrics.youden_threshold(val.target, val.probability)
        else:
            threshold = metrics.sensitivity_threshold(val.target, val.probability, sensitivity)
    except MetricError as error:
        return OperatingPoint(name, words, None, f"val: {error}")
    return OperatingPoint(name, words, threshold)


def evaluate_split(
    rows: Predictions,
    split: str,
    points: Mapping[str, OperatingPoint],
    *,
    resamples: int,
    seed: int,
) -> SplitEvaluation:
    """Judge `rows`, all of one split, at operating points that are already chosen."""
    ranked = _bootstrap(
        rows,
        {
            "auroc": (metrics.auroc_statistic, rows.target, rows.logit),
            "average_precision": (
                metrics.average_precision_statistic,
                rows.target,
                rows.logit,
            ),
            "log_loss": (metrics.log_loss_statistic, rows.target, rows.logit),
            "brier": (metrics.brier_statistic, rows.target, rows.probability),
        },
        resamples=resamples,
        seed=seed,
    )
    roc: Curve | None = None
    precision_recall: Curve | None = None
    with contextlib.suppress(MetricError):  # auroc carries the reason
        roc = metrics.roc_points(rows.target, rows.logit)
        precision_recall = metrics.precision_recall_points(rows.target, rows.logit)
    return SplitEvaluation(
        split=split,
        n=len(rows),
        positives=int(rows.target.sum()),
        patients=len(np.unique(rows.patient)),
        **ranked,
        auroc_delong=metrics.delong(rows.target, rows.logit),
        at={
            name: _at_point(rows, point, resamples=resamples, seed=seed)
            for name, point in points.items()
        },
        roc=roc,
        precision_recall=precision_recall,
        view=view_baseline(rows, resamples=resamples, seed=seed),
    )


def _at_point(rows: Predictions, point: OperatingPoint, *, resamples: int, seed: int) -> AtPoint:
    if point.threshold is None:
        reason = f"no threshold: {point.reason}"
        return AtPoint(None, dict.fromkeys(metrics.RATES, Estimate.undefined(reason)))
    try:
        counts = metrics.confusion(rows.target, rows.probability, point.threshold)
    except MetricError as error:
        return AtPoint(None, dict.fromkeys(metrics.RATES, Estimate.undefined(str(error))))
    estimates = metrics.rate_estimates(
        rows.target,
        rows.probability,
        point.threshold,
        rows.patient,
        resamples=resamples,
        seed=seed,
    )
    return AtPoint(counts, estimates)


def view_baseline(rows: Predictions, *, resamples: int, seed: int) -> ViewBaseline:
    """The model beside the view alone, on the studies of `rows` whose view is known."""
    known = rows.take(rows.view != "")

    is_ap = known.view == "AP"
    found = _bootstrap(
        known,
        {
            "model": (metrics.auroc_statistic, known.target, known.logit),
            "view_only": (metrics.auroc_statistic, known.target, is_ap),
            "gain": (_auroc_gain, known.target, known.logit, is_ap),
        },
        resamples=resamples,
        seed=seed,
    )
    within = {}
    for name in ("AP", "PA"):
        part = known.take(known.view == name)
        auroc = {"auroc": (metrics.auroc_statistic, part.target, part.logit)}
        within[name] = _bootstrap(part, auroc, resamples=resamples, seed=seed)["auroc"]
    return ViewBaseline(n=len(known), **found, within=within)


def _auroc_gain(
    target: npt.ArrayLike, score: npt.ArrayLike, baseline: npt.ArrayLike
) -> metrics.Statistic:
    of_score = metrics.auroc_statistic(target, score)
    of_baseline = metrics.auroc_statistic(target, baseline)
    return lambda weights: of_score(weights) - of_baseline(weights)


def _bootstrap(
    rows: Predictions,
    builders: Mapping[str, tuple[Any, ...]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """An estimate a builder (function, arguments…): undefined, with the reason, where it raises."""
    statistics, estimates = {}, {}
    for name, (build, *arguments) in builders.items():
        try:
            statistics[name] = build(*arguments)
        except MetricError as error:
            estimates[name] = Estimate.undefined(str(error))
    if statistics:
        estimates |= metrics.patient_bootstrap(
            rows.patient, statistics, resamples=resamples, seed=seed
        )
    return estimates
