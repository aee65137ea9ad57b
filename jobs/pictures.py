"""Which studies of test an evaluation shows, and where the network looks in all positives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.scoring import Explained, Scored, boxes_of, explain_studies, score_boxes
from pneumo.config import Config
from pneumo.explain import (
    Why,
    choose_errors,
    choose_gallery,
    count_errors,
)
from pneumo.figures import Case, Pictures
from pneumo.operating_points import Decision
from pneumo.predict import Predictions
from pneumo.quality import AGE_BIN_YEARS
from pneumo.saliency import (
    SaliencySummary,
    choose_iou_thresholds,
    prior_map,
    scale_boxes,
    summarise_saliency,
)
from pneumo.shards import StudyRow
from pneumo.studies import Box

MAX_TOLD_AGE = 89
"""Years. Who is older is told of as one group: 45 CFR 164.514(b)(2)(i)(C)."""


def choose_pictures(
    scored: Scored,
    predictions: Predictions,
    studies: Mapping[str, StudyRow],
    decision: Decision,
    config: Config,
) -> Pictures:
    """The grid, the gallery of each outcome, and the errors, of test.

    None without a threshold: a study has no outcome then. `decision` has none either where a score
    is no number, as to show the others alone would flatter the model.
    """
    threshold = decision.threshold
    if threshold is None:
        return Pictures.none(str(decision.reason))
    test = predictions.subset("test")
    settings = config.evaluate
    grid = np.random.default_rng(config.seed).permutation(len(test))[: settings.grid_images]
    called = (test.target, test.probability, threshold)
    gallery = choose_gallery(*called, per_outcome=settings.gallery_images, seed=config.seed)
    errors = choose_errors(*called, count=settings.error_images)
    in_gallery = [[choice.row for choice in choices] for choices in gallery.values()]
    chosen = _union(grid, *in_gallery, *errors.values())
    shown = explain_studies(scored, "test", test.key[chosen].tolist(), config)

    def case(row: Any, why: Why | None, *, with_cam: bool = True) -> Case:
        study = studies[str(test.key[row])]
        explained: Explained = shown[study.key]
        return Case(
            image=explained.pixels,
            target=study.target,
            probability=float(test.probability[row]),
            threshold=threshold,
            boxes=study.boxes if with_cam else (),
            cam=explained.cam if with_cam and np.isfinite(explained.cam).all() else None,
            finding=study.finding,
            view=study.view or "",
            age_band=describe_age(study.age),
            why=why,
        )

    return Pictures(
        grid=[case(row, None, with_cam=False) for row in grid],
        gallery={o: [case(c.row, c.why) for c in choices] for o, choices in gallery.items()},
        errors={o: [case(row, "most certain") for row in rows] for o, rows in errors.items()},
        by_finding=count_errors(
            test.finding,
            *called,
            patient=test.patient,
            resamples=settings.bootstrap_resamples,
            seed=config.seed,
        ),
    )


def _union(*rows: Iterable[Any]) -> npt.NDArray[np.intp]:
    return np.unique(np.concatenate([np.asarray(part, dtype=np.intp) for part in rows]))


def describe_age(age: float | None) -> str:
    """`60-69`, `90+`, or '' where unknown: a picture needs no exact age beside it."""
    if age is None or math.isnan(age):
        return ""
    if age > MAX_TOLD_AGE:
        return f"{MAX_TOLD_AGE + 1}+"
    low = int(age) // AGE_BIN_YEARS * AGE_BIN_YEARS
    return f"{low}-{low + AGE_BIN_YEARS - 1}"


def score_saliency(
    scored: Scored,
    predictions: Predictions,
    studies: Mapping[str, StudyRow],
    decisions: Mapping[str, Decision],
    config: Config,
    *,
    stored_size: int,
    image_size: int,
) -> dict[str, SaliencySummary]:
    """By split, val and test, the network's maps against the boxes of every positive.

    `decisions` are by split. `image_size` is of the input of the first
    checkpoint, whose maps they are. The prior map is of train, the IoU's thresholds are of val.
    """

    def in_input(split: str) -> dict[str, tuple[Box, ...]]:
        return {
            key: scale_boxes(boxes, stored_size=stored_size, image_size=image_size)
            for key, boxes in boxes_of(studies, split).items()
        }

    of_train = list(in_input("train").values())
    prior = prior_map(of_train, image_size)
    found = score_boxes(scored, {s: in_input(s) for s in ("val", "test")}, prior, config)
    iou_thresholds = choose_iou_thresholds(found["val"])
    return {
        split: summarise_saliency(
            scores,
            patient=np.array([studies[key].patient for key in scores.keys.tolist()], dtype=np.str_),
            is_called=call_studies(predictions, scores.keys, decisions[split]),
            positives=int(predictions.subset(split).target.sum()),
            checkpoint=scored.scoring.weights[0].name,
            prior_studies=len(of_train),
            iou_thresholds=iou_thresholds,
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
        )
        for split, scores in found.items()
    }


def call_studies(
    predictions: Predictions, keys: npt.NDArray[np.str_], decision: Decision
) -> npt.NDArray[np.bool_] | str:
    """Whether each study is called positive (N,), or why none is called anything."""
    if decision.threshold is None:
        return str(decision.reason)
    order = np.argsort(predictions.key)
    rows = order[np.searchsorted(predictions.key, keys, sorter=order)]
    return np.asarray(predictions.probability[rows] >= decision.threshold)
