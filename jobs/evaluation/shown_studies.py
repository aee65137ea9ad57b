"""Which studies of test an evaluation shows, and where the network looks in all positives."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from jobs.evaluation.ray_scoring import Explained, Scored, boxes_of, explain_studies, score_boxes
from pneumo.config import Config
from pneumo.dataset.quality import AGE_BIN_YEARS
from pneumo.dataset.study_table import StudyRow
from pneumo.evaluation.map_scores import (
    SaliencySummary,
    prior_map,
    scale_boxes,
    summarise_saliency,
)
from pneumo.evaluation.operating_points import Decision
from pneumo.evaluation.predictions import Predictions
from pneumo.evaluation.shown_studies import (
    GalleryChoice,
    Outcome,
    SampledStudy,
    Why,
    choose_errors,
    choose_gallery,
    count_errors,
    draw_sample,
)
from pneumo.images.boxes import Box
from pneumo.reporting.figures.case_pictures import Case, Pictures

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
    if decision.logit is None:
        return Pictures.none(str(decision.reason))
    test, settings = predictions.subset("test"), config.evaluate
    chosen = choose_rows(test, decision.logit, config)
    shown = explain_studies(scored, "test", test.key[chosen.union].tolist(), config)

    def case(row: int, why: Why | None = None, drawn_of: int | None = None) -> Case:
        key = str(test.key[row])
        made = make_case(studies[key], shown[key], test.take(np.array([row])), decision)
        return replace(made, why=why, drawn_of=drawn_of)

    return Pictures(
        grid=[replace(case(row), boxes=(), cam=None) for row in chosen.grid],
        gallery={o: [case(c.row, c.why) for c in rows] for o, rows in chosen.gallery.items()},
        errors={
            o: [case(row, "most certain") for row in rows] for o, rows in chosen.errors.items()
        },
        by_finding=count_errors(
            test.finding,
            test.target,
            test.logit,
            decision.logit,
            patient=test.patient,
            resamples=settings.bootstrap_resamples,
            seed=config.seed,
        ),
        sample=[case(draw.row, "drawn", draw.drawn_of) for draw in chosen.sample],
    )


@dataclass(frozen=True)
class Chosen:
    """Which rows of test are shown, and where."""

    grid: list[int]
    gallery: Mapping[Outcome, list[GalleryChoice]]
    errors: Mapping[Outcome, list[int]]
    sample: list[SampledStudy]

    @property
    def union(self) -> list[int]:
        """Each of them once."""
        rows = [*self.grid, *(draw.row for draw in self.sample)]
        rows += [choice.row for choices in self.gallery.values() for choice in choices]
        rows += [row for some in self.errors.values() for row in some]
        return sorted(set(rows))


GRID_PICTURES = 16
"""Random studies of test in the grid."""
TABLE_PICTURES = 4
"""Random studies of each outcome and view in W&B's table of predictions."""


def choose_rows(test: Predictions, threshold: float, config: Config) -> Chosen:
    """Some drawn by the seed, some of each outcome, the most certain errors, and some of each
    outcome and view."""
    pictures, seed = config.evaluate.pictures, config.seed
    called = (test.target, test.logit, threshold)
    grid = np.random.default_rng(seed).permutation(len(test))[:GRID_PICTURES]
    errors = choose_errors(*called, count=2 * pictures)
    return Chosen(
        grid=grid.tolist(),
        gallery=choose_gallery(*called, per_outcome=pictures, seed=seed),
        errors={outcome: rows.tolist() for outcome, rows in errors.items()},
        sample=draw_sample(
            test.target,
            test.logit,
            test.view,
            threshold,
            per_stratum=TABLE_PICTURES,
            seed=seed,
        ),
    )


def make_case(study: StudyRow, explained: Explained, row: Predictions, decision: Decision) -> Case:
    """A study with its boxes, and its map where that is a number throughout; `row` is its own."""
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

    `decisions` are by split. `image_size` is of the input of the first checkpoint, whose maps they
    are. The prior map is of train.
    """

    def in_input(split: str) -> dict[str, tuple[Box, ...]]:
        return {
            key: scale_boxes(boxes, stored_size=stored_size, image_size=image_size)
            for key, boxes in boxes_of(studies, split).items()
        }

    of_train = list(in_input("train").values())
    prior = prior_map(of_train, image_size)
    found = score_boxes(scored, {s: in_input(s) for s in ("val", "test")}, prior, config)
    return {
        split: summarise_saliency(
            scores,
            patient=np.array([studies[key].patient for key in scores.keys.tolist()], dtype=np.str_),
            is_called=call_studies(predictions, scores.keys, decisions[split]),
            positives=int(predictions.subset(split).target.sum()),
            checkpoint=scored.scoring.weights[0].name,
            prior_studies=len(of_train),
            resamples=config.evaluate.bootstrap_resamples,
            seed=config.seed,
        )
        for split, scores in found.items()
    }


def call_studies(
    predictions: Predictions, keys: npt.NDArray[np.str_], decision: Decision
) -> npt.NDArray[np.bool_] | str:
    """Whether each study is called positive (N,), or why none is called anything."""
    if decision.logit is None:
        return str(decision.reason)
    order = np.argsort(predictions.key)
    rows = order[np.searchsorted(predictions.key, keys, sorter=order)]
    return decision.call(predictions.logit[rows])
