"""The studies of test that an evaluation shows, and the saliency maps of all positives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jobs.evaluation.evaluated_run import EVALUATED_SPLITS, EvaluatedRun
from jobs.evaluation.ray_scoring import (
    ExplainedStudy,
    ScoredStore,
    explain_studies,
    score_maps,
)
from pneumo.config import Config
from pneumo.dataset.quality import AGE_BIN_YEARS
from pneumo.dataset.study_table import StudyRow
from pneumo.evaluation.evaluation import Evaluation
from pneumo.evaluation.map_scores import (
    SaliencySummary,
    prior_map,
    scale_boxes,
    summarise_saliency,
)
from pneumo.evaluation.operating_points import Decision
from pneumo.evaluation.predictions import Predictions
from pneumo.evaluation.shown_studies import (
    ShownStudy,
    choose_errors,
    choose_gallery,
    count_errors,
    sample_studies,
)
from pneumo.images.boxes import Box
from pneumo.reporting.figures.case_pictures import Case, Pictures

MAX_EXACT_AGE = 89
"""Years. Older patients are one group, 90 and over: 45 CFR 164.514(b)(2)(i)(C)."""


def choose_pictures(
    scored: ScoredStore,
    predictions: Predictions,
    studies: Mapping[str, StudyRow],
    decision: Decision,
    config: Config,
) -> Pictures:
    """The grid, the gallery of each outcome, and the errors, of test.

    There are none without a threshold, as studies then have no outcome, nor where a score is NaN or
    infinite, as showing only the other studies would flatter the model.
    """
    if decision.logit is None:
        return Pictures.none(str(decision.reason))
    test, seed = predictions.subset("test"), config.seed
    called, per_outcome = (test.target, test.logit, decision.logit), config.evaluate.pictures
    grid = np.random.default_rng(seed).permutation(len(test))[:GRID_PICTURES].tolist()
    gallery = choose_gallery(*called, per_outcome=per_outcome, seed=seed)
    errors = choose_errors(*called, count=2 * per_outcome)
    sample = sample_studies(*called, view=test.view, per_stratum=TABLE_PICTURES, seed=seed)
    groups = (sample, *gallery.values(), *errors.values())
    rows = sorted({*grid, *(one.row for group in groups for one in group)})
    explained = explain_studies(scored, "test", test.key[rows].tolist(), config)

    def case(row: int) -> Case:
        key = str(test.key[row])
        return make_case(studies[key], explained[key], test.take(np.array([row])), decision)

    def show(group: Sequence[ShownStudy]) -> list[Case]:
        return [replace(case(one.row), why=one.why, stratum_size=one.stratum_size) for one in group]

    return Pictures(
        grid=[replace(case(row), boxes=(), cam=None) for row in grid],
        gallery={outcome: show(group) for outcome, group in gallery.items()},
        errors={outcome: show(group) for outcome, group in errors.items()},
        by_finding=count_errors(
            test.finding,
            *called,
            patient=test.patient,
            resamples=config.evaluate.bootstrap_resamples,
            seed=seed,
        ),
        sample=show(sample),
    )


GRID_PICTURES = 16
"""Random studies of test in the grid."""
TABLE_PICTURES = 4
"""Random studies of each outcome and view in W&B's table of predictions."""


def make_case(
    study: StudyRow, explained: ExplainedStudy, row: Predictions, decision: Decision
) -> Case:
    """A study with its boxes, and its map where all values are finite. `row` is its prediction."""
    calibrated = float(row.calibrated_probability[0])
    is_calibrated = decision.calibrated is not None and not math.isnan(calibrated)
    probability = calibrated if is_calibrated else float(row.probability[0])
    threshold = decision.calibrated if is_calibrated else decision.threshold
    assert threshold is not None
    return Case(
        image=explained.pixels,
        target=study.target,
        probability=probability,
        threshold=threshold,
        is_called=bool(decision.call(row.logit)[0]),
        boxes=study.boxes,
        cam=explained.cam if np.isfinite(explained.cam).all() else None,
        finding=study.finding,
        view=study.view or "",
        age_band=describe_age(study.age),
    )


def describe_age(age: float | None) -> str:
    """`60-69`, `90+`, or '' where unknown: an image is not shown with the exact age."""
    if age is None or math.isnan(age):
        return ""
    if age > MAX_EXACT_AGE:
        return f"{MAX_EXACT_AGE + 1}+"
    low = int(age) // AGE_BIN_YEARS * AGE_BIN_YEARS
    return f"{low}-{low + AGE_BIN_YEARS - 1}"


def score_saliency(
    run: EvaluatedRun, evaluation: Evaluation, studies: Mapping[str, StudyRow], config: Config
) -> dict[str, SaliencySummary]:
    """By split (val, test), the network's maps against the boxes of every positive; empty with
    evaluate.saliency off.

    The maps are those of the first checkpoint; the prior map comes from train.
    """
    if not config.evaluate.saliency:
        return {}
    stored_size, image_size = run.manifest.image_size, run.checkpoint.image_size

    def in_input(split: str) -> dict[str, tuple[Box, ...]]:
        return {
            key: scale_boxes(boxes, stored_size=stored_size, image_size=image_size)
            for key, boxes in list_boxes(studies, split).items()
        }

    of_train, predictions = list(in_input("train").values()), evaluation.predictions
    prior = prior_map(of_train, image_size)
    found = score_maps(run.scored, {s: in_input(s) for s in EVALUATED_SPLITS}, prior, config)
    return {
        split: summarise_saliency(
            scores,
            patient=np.array([studies[key].patient for key in scores.keys.tolist()], dtype=np.str_),
            is_called=call_studies(predictions, scores.keys, evaluation.decide(split)),
            positives=int(predictions.subset(split).target.sum()),
            checkpoint=run.scored.scoring.checkpoints[0].name,
            prior_studies=len(of_train),
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
        )
        for split, scores in found.items()
    }


def list_boxes(studies: Mapping[str, StudyRow], split: str) -> dict[str, tuple[Box, ...]]:
    """The boxes of a split's positives, in stored pixels, by key."""
    return {
        row.key: row.boxes
        for row in studies.values()
        if row.split == split and row.target == 1 and row.boxes
    }


def call_studies(
    predictions: Predictions, keys: npt.NDArray[np.str_], decision: Decision
) -> npt.NDArray[np.bool_] | str:
    """Whether each study is called positive (N,), or why there is no threshold."""
    if decision.logit is None:
        return str(decision.reason)
    order = np.argsort(predictions.key)
    rows = order[np.searchsorted(predictions.key, keys, sorter=order)]
    return decision.call(predictions.logit[rows])
