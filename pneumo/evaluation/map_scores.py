"""How well maps of evidence agree with the radiologists' boxes, compared with two that know less.

Every measure is of a map (H, W) of values from 0 up and boxes in its pixels, and none depends on
the map's scale. A map that looks at no image still scores, because pneumonia lies in the lungs and
the lungs in the middle; so each measure of the network's maps is compared with those of

    prior     the fraction of the train split's positives that have a box there
    random    the same network with random weights (Adebayo 2018)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import (
    Estimate,
    Floats,
    Statistic,
    as_json,
    divide,
    patient_bootstrap,
)
from pneumo.images.boxes import Box

MapName = Literal["cam", "prior", "random"]
MAPS: tuple[MapName, ...] = get_args(MapName)
BASELINES: tuple[MapName, ...] = MAPS[1:]

Measure = Literal["auprc", "pointing", "energy"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""The columns of `BoxScores.values`:

auprc       average precision of the map as a classifier of the boxes' pixels (Arun 2021)
pointing    fraction of the map's maximal pixels that lie in a box: 0 or 1 but for ties; 0 of an
            empty map, which points nowhere (the pointing game, Zhang 2018)
energy      fraction of the map's sum that lies in the boxes; NaN of an empty map (Wang 2020)
"""
MIN_POSITIVES = 5
"""Fewer than this many studies are not summarised."""


def scale_boxes(boxes: Sequence[Box], *, stored_size: int, image_size: int) -> tuple[Box, ...]:
    """Boxes in pixels of the stored image, in those of the network's input."""
    ratio = image_size / stored_size
    return tuple(Box(*(value * ratio for value in box)) for box in boxes)


def box_mask(shape: Sequence[int], boxes: Sequence[Box]) -> npt.NDArray[np.bool_]:
    """True where a pixel's centre lies in a box; (H, W)."""
    height, width = shape
    row, column = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    mask = np.zeros((height, width), dtype=np.bool_)
    for x, y, box_width, box_height in boxes:
        in_rows = (row >= y) & (row < y + box_height)
        mask |= in_rows & (column >= x) & (column < x + box_width)
    return mask


def prior_map(boxes_of_train: Sequence[Sequence[Box]], image_size: int) -> Floats:
    """(S, S): the fraction of studies, those of the train split, whose boxes cover a pixel.

    `boxes_of_train` holds the boxes of each positive in pixels of the map. Without a study it is 1
    everywhere: nothing is known of where to look.
    """
    total = np.zeros((image_size, image_size))
    for boxes in boxes_of_train:
        total += box_mask(total.shape, boxes)
    return total / len(boxes_of_train) if total.any() else np.ones_like(total)


def score_map(values: npt.NDArray[Any], boxes: Sequence[Box]) -> Floats:
    """The MEASURES of one map (H, W) and the boxes of its study, (3,).

    Raises MetricError where the boxes cover no pixel's centre, or the map holds a NaN, an infinity
    or a negative value.
    """
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise MetricError("a map of evidence holds a value that is negative or no number")
    mask = box_mask(values.shape, boxes)
    if not mask.any():
        raise MetricError(f"no box lies on the map of shape {values.shape}")
    from sklearn.metrics import average_precision_score  # a second, which who only scores has not

    auprc = average_precision_score(mask.ravel(), values.ravel())
    total, greatest = values.sum(dtype=np.float64), values.max()
    if greatest == 0:
        return np.array([auprc, 0.0, np.nan])
    pointing = mask[values == greatest].mean()
    return np.array([auprc, pointing, values[mask].sum(dtype=np.float64) / total])


@dataclass(frozen=True, eq=False)
class BoxScores:
    """Every map of some positives, scored."""

    keys: npt.NDArray[np.str_]
    """(N,) of the studies."""
    values: Floats
    """(N, MAPS, MEASURES)."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All parts as one, sorted by key: the same however the work was split."""
        nothing = np.empty((0, len(MAPS), len(MEASURES)))
        keys = np.concatenate([np.empty(0, np.str_), *(part.keys for part in parts)])
        values = np.concatenate([nothing, *(part.values for part in parts)])
        order = np.argsort(keys)
        return cls(keys[order], values[order])

    def column(self, name: MapName, measure: Measure) -> Floats:
        """One measure of one kind of map, (N,)."""
        return self.values[:, MAPS.index(name), MEASURES.index(measure)]


@dataclass(frozen=True)
class MapSummary:
    """How one kind of map agrees with the boxes of many studies."""

    auprc: Estimate
    pointing: Estimate
    energy: Estimate
    """Mean over the maps that are not empty."""
    empty: int
    """Maps that are 0 everywhere."""


@dataclass(frozen=True)
class GroupSummary:
    """The maps of some studies: all positives, those found, or those missed."""

    n: int
    reason: str | None
    """Why there is no summary, where there is none."""
    maps: Mapping[MapName, MapSummary] | None = None
    gain: Mapping[MapName, Mapping[Measure, Estimate]] | None = None
    """By baseline: how much more of each measure the network's maps have than it, study by study
    over the same resamples."""

    def to_json(self) -> dict[str, Any]:
        """`n`, and the summaries or null with the reason."""
        if self.maps is None or self.gain is None:
            return {"n": self.n, "maps": None, "reason": self.reason}
        return {"n": self.n, "maps": as_json(self.maps), "gain": as_json(self.gain)}


Group = Literal["all", "true_positives", "false_negatives"]


@dataclass(frozen=True)
class SaliencySummary:
    """Where the network looks in the positives of a split."""

    positives: int
    """Of the split."""
    unscored: int
    """Of them those without a box that covers a pixel of the input, or whose map is no number."""
    checkpoint: str
    """Whose maps these are."""
    prior_studies: int
    """Positives of train whose boxes made the prior map; of none it is 1 everywhere."""
    groups: Mapping[Group, GroupSummary]

    def to_json(self) -> dict[str, Any]:
        """The object `saliency` of metrics.json."""
        return {**as_json(self, leave_out={"groups"}), **as_json(self.groups)}


def summarise_saliency(
    scores: BoxScores,
    *,
    patient: npt.NDArray[np.str_],
    is_called: npt.NDArray[np.bool_] | str,
    positives: int,
    checkpoint: str,
    prior_studies: int,
    resamples: int,
    seed: int,
) -> SaliencySummary:
    """The scores of a split's positives with patient-bootstrap intervals.

    `patient` and `is_called` (N,) belong to the rows of `scores`: whose study it is, and whether
    the model calls it positive, or why it calls none anything. `positives` counts all of the
    split's, `prior_studies` those of train that made the prior map.
    """
    rows: dict[Group, npt.NDArray[np.bool_] | str] = {
        "all": np.ones(len(scores), dtype=np.bool_),
        "true_positives": is_called,
        "false_negatives": is_called if isinstance(is_called, str) else ~is_called,
    }

    def summarise(chosen: npt.NDArray[np.bool_] | str) -> GroupSummary:
        if isinstance(chosen, str):
            return GroupSummary(0, chosen)
        group = BoxScores(scores.keys[chosen], scores.values[chosen])
        return _summarise_group(group, patient[chosen], resamples=resamples, seed=seed)

    return SaliencySummary(
        positives=positives,
        unscored=positives - len(scores),
        checkpoint=checkpoint,
        prior_studies=prior_studies,
        groups={name: summarise(chosen) for name, chosen in rows.items()},
    )


def _summarise_group(
    scores: BoxScores, patient: npt.NDArray[np.str_], *, resamples: int, seed: int
) -> GroupSummary:
    n = len(scores)
    if n == 0:
        return GroupSummary(0, "no such study with boxes")
    if n < MIN_POSITIVES:
        return GroupSummary(n, f"{n} studies with boxes, fewer than {MIN_POSITIVES}")
    statistics: dict[str, Statistic] = {}
    for measure in MEASURES:
        own = scores.column("cam", measure)
        for name in MAPS:
            other = scores.column(name, measure)
            statistics[f"{name}/{measure}"] = _mean_statistic(other)
            statistics[f"gain/{name}/{measure}"] = _mean_statistic(own - other)
    found = patient_bootstrap(patient, statistics, resamples=resamples, seed=seed)
    return GroupSummary(
        n=n,
        reason=None,
        maps={
            name: MapSummary(
                **{measure: found[f"{name}/{measure}"] for measure in MEASURES},
                empty=int(np.isnan(scores.column(name, "energy")).sum()),
            )
            for name in MAPS
        },
        gain={
            name: {measure: found[f"gain/{name}/{measure}"] for measure in MEASURES}
            for name in BASELINES
        },
    )


def _mean_statistic(values: Floats) -> Statistic:
    """The weighted mean of what is not NaN; NaN where nothing is left."""
    known, present = np.nan_to_num(values), (~np.isnan(values)).astype(np.float64)
    return lambda weights: divide(known @ weights, present @ weights)
