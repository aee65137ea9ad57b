"""Synthetic predictions for the tests and the benchmarks of the evaluation."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import logit

from pneumo.config import EvaluateConfig
from pneumo.evaluation import bootstrap
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.evaluation import Evaluation, evaluate
from pneumo.evaluation.operating_points import (
    OperatingPoint,
    PointEvaluation,
    evaluate_points,
    outcomes_statistic,
)
from pneumo.evaluation.predictions import Predictions, sigmoid


def make_predictions(
    n: int, *, images_per_patient: int = 1, seed: int = 0, effect: float = 1.8
) -> Predictions:
    """`n` studies like RSNA's in prevalence, view, sex, age and boxes; every second patient is val.

    Positives score `effect` standard deviations higher: an AUROC of 0.90 by default.
    """
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // images_per_patient
    target = (rng.random(n) < 0.225).astype(np.int8)
    score = (effect * target + rng.normal(size=n) - 1.5).astype(np.float32)
    negative = np.where(rng.random(n) < 0.57, "No Lung Opacity / Not Normal", "Normal")
    return Predictions(
        key=np.char.add("k", np.arange(n).astype(np.str_)),
        patient=np.char.add("p", patient.astype(np.str_)),
        split=np.where(patient % 2 == 0, "val", "test"),
        target=target,
        logit=score,
        probability=sigmoid(score),
        calibrated_probability=np.full(n, np.nan),
        checkpoint=np.full(n, "best"),
        finding=np.where(target == 1, "Lung Opacity", negative),
        age=rng.integers(18, 95, n).astype(np.float64),
        sex=np.where(rng.random(n) < 0.57, "M", "F"),
        view=np.where(rng.random(n) < 0.35 + 0.4 * target, "AP", "PA"),
        spacing_mm=rng.choice([0.139, 0.143, 0.168, 0.171], n),
        box_area_fraction=np.where(target == 1, rng.random(n) / 4, np.nan),
    )


def make_plain(n: int = 400, *, seed: int = 0, **columns: Any) -> Predictions:
    """`n` studies, half of them positive, of as many patients, who differ in little else; every
    second is val. `columns` replace some of them."""
    rng = np.random.default_rng(seed)
    target = columns.get("target", rng.integers(0, 2, n)).astype(np.int8)
    score = (2 * target + rng.normal(size=n) - 1).astype(np.float32)
    logit = columns.get("logit", score)
    rows = Predictions(
        key=np.char.add("k", np.arange(n).astype(np.str_)),
        patient=np.char.add("p", np.arange(n).astype(np.str_)),
        split=np.where(np.arange(n) % 2, "val", "test"),
        target=target,
        logit=logit,
        probability=sigmoid(logit),
        calibrated_probability=np.full(n, np.nan),
        checkpoint=np.full(n, "best"),
        finding=np.where(target == 1, "Lung Opacity", "Normal"),
        age=np.full(n, 50.0),
        sex=np.full(n, "F"),
        view=np.where(rng.random(n) < 0.5, "AP", "PA"),
        spacing_mm=np.full(n, 0.143),
        box_area_fraction=np.where(target == 1, rng.random(n) / 5, np.nan),
    )
    return replace(rows, **columns)


def judge(rows: Predictions, **options: Any) -> Evaluation:
    """Their evaluation with a hundred resamples; they serve as the metadata of train too."""
    config = EvaluateConfig(bootstrap_resamples=100)
    settings = {"config": config, "seed": 0, "train": Metadata.of(rows), **options}
    return evaluate(rows, **settings)


def evaluate_threshold(
    rows: Predictions, threshold: float, *, resamples: int = 100, seed: int = 0
) -> PointEvaluation:
    """The evaluation of `rows` at one threshold on the probability."""
    points = {"p": OperatingPoint("p", "", float(logit(threshold)))}
    statistic = {"outcomes": outcomes_statistic(rows, points)}
    few = rows.count_rarer_class()
    found = bootstrap.resample(
        rows.patient, statistic, resamples=resamples, seed=seed, effective_patients=few
    )
    return evaluate_points(rows, points, bootstrap.StatisticSet(found))["p"]


def with_scores(
    target: npt.ArrayLike, probability: npt.ArrayLike, patient: npt.ArrayLike | None = None
) -> Predictions:
    """Predictions with these probabilities (N,); each of another patient by default."""
    probability64 = np.asarray(probability, dtype=np.float64)
    n = len(probability64)
    names: Any = np.arange(n) if patient is None else np.asarray(patient)
    return replace(
        make_predictions(n),
        target=np.asarray(target, dtype=np.int8),
        logit=logit(np.clip(probability64, 1e-9, 1 - 1e-9)),
        probability=probability64,
        patient=names.astype(np.str_),
    )
