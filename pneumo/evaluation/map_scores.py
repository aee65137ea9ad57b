"""How well maps of evidence agree with the radiologists' boxes, beside maps that know nothing.

Every measure is of a map (H, W) of values from 0 up and boxes in its pixels, and none depends on
the map's scale. A map that knows nothing still scores, because pneumonia lies in the lungs and the
lungs in the middle; so each measure of the network's maps stands beside those of

    uniform   the same everywhere: what the boxes' area alone gives
    centre    a Gaussian about the middle
    prior     the share of the train split's positives that have a box there
    random    the same network with random weights (Adebayo 2018)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.metrics import Estimate, Floats, Statistic, patient_bootstrap
from pneumo.images.boxes import Box

MapName = Literal["cam", "random", "prior", "centre", "uniform"]
MAPS: tuple[MapName, ...] = get_args(MapName)
BASELINES: tuple[MapName, ...] = MAPS[1:]

IOU_THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Shares of a map's maximum at and above which a pixel counts as marked."""
POINTING_TOLERANCE = 15 / 224
"""How far outside a box the maximum may lie for `pointing_near`, as a share of the image's side:
the 15 pixels of Zhang et al. (2018)."""
CENTRE_SIGMA = 0.25
"""Standard deviation of the centre map, as a share of the image's side."""
MIN_POSITIVES = 5
"""Fewer than this many studies are not summarised."""

_SINGLE = ("pointing", "pointing_near", "energy", "area", "auprc")
MEASURES = (*_SINGLE, *(f"iou_{threshold}" for threshold in IOU_THRESHOLDS))
"""The columns of `BoxScores.values`:

pointing        share of the map's maximal pixels that lie in a box: 0 or 1 but for ties; 0 of an
                empty map, which points nowhere (the pointing game, Zhang 2018)
pointing_near   the same with boxes widened by POINTING_TOLERANCE on each side
energy          share of the map's sum that lies in the boxes; NaN of an empty map
area            share of the image that the boxes cover: the energy of a uniform map
auprc           average precision of the map as a classifier of the boxes' pixels (Arun 2021)
iou_t           intersection over union of the boxes and the pixels at or above t of the maximum; 0
                of an empty map
"""
_IOU = slice(len(_SINGLE), None)


# --- boxes ----------------------------------------------------------------------------------------


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


def widen(boxes: Sequence[Box], margin: float) -> tuple[Box, ...]:
    """Boxes with `margin` pixels more on each side."""
    return tuple(
        Box(x - margin, y - margin, width + 2 * margin, height + 2 * margin)
        for x, y, width, height in boxes
    )


# --- maps -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RankedMap:
    """A map with its pixels in order, so that one that is the same for every study is sorted
    once."""

    values: Floats
    """(H, W), from 0 up."""
    order: npt.NDArray[np.intp]
    """(H * W,) flat indices, the greatest value first."""
    ends: npt.NDArray[np.intp]
    """(K,) place in `order` of the last pixel of each distinct value."""

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Self:
        """Raises MetricError for a map with a NaN, an infinity or a negative value."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        if not np.isfinite(flat).all() or flat.min(initial=0) < 0:
            raise MetricError("a map of evidence holds a value that is negative or no number")
        # Sorting float32 takes half the time, and the network's maps are float32 anyway.
        keys = values.ravel() if values.dtype == np.float32 else flat
        order = np.argsort(-keys)
        ordered = flat[order]
        ends = np.append(np.flatnonzero(np.diff(ordered)), len(flat) - 1)
        return cls(flat.reshape(values.shape), order, ends)


def uniform_map(image_size: int) -> Floats:
    """(S, S) of ones."""
    return np.ones((image_size, image_size))


def centre_map(image_size: int) -> Floats:
    """(S, S) Gaussian about the middle, of standard deviation CENTRE_SIGMA * S; at most 1."""
    offset = (np.arange(image_size) + 0.5) / image_size - 0.5
    one = np.exp(-0.5 * (offset / CENTRE_SIGMA) ** 2)
    return np.outer(one, one)


def prior_map(boxes_of_train: Sequence[Sequence[Box]], image_size: int) -> Floats:
    """(S, S): the share of studies, those of the train split, whose boxes cover a pixel.

    `boxes_of_train` holds the boxes of each positive in pixels of the map. Without a study it is
    uniform: nothing is known of where to look.
    """
    total = np.zeros((image_size, image_size))
    for boxes in boxes_of_train:
        total += box_mask(total.shape, boxes)
    return total / len(boxes_of_train) if total.any() else uniform_map(image_size)


# --- one study ------------------------------------------------------------------------------------


def score_map(ranked: RankedMap, boxes: Sequence[Box]) -> Floats:
    """The MEASURES of one map and the boxes of its study, (14,).

    Raises MetricError where the boxes cover no pixel's centre.
    """
    mask = box_mask(ranked.values.shape, boxes)
    area = int(mask.sum())
    if area == 0:
        raise MetricError(f"no box lies on the map of shape {ranked.values.shape}")
    near = box_mask(mask.shape, widen(boxes, POINTING_TOLERANCE * max(mask.shape)))
    ordered = ranked.values.ravel()[ranked.order]
    hits = np.cumsum(mask.ravel()[ranked.order], dtype=np.intp)
    total, greatest = float(ranked.values.sum()), float(ordered[0])
    num_peaks = int(ranked.ends[0]) + 1
    peaks = ranked.order[:num_peaks]
    # How many pixels are marked at each threshold; the order is descending.
    marked = np.searchsorted(-ordered, [-t * greatest for t in IOU_THRESHOLDS], side="right")
    inside = hits[marked - 1]
    is_empty = total == 0
    single = (
        0.0 if is_empty else hits[num_peaks - 1] / num_peaks,
        0.0 if is_empty else near.ravel()[peaks].mean(),
        np.nan if is_empty else ranked.values[mask].sum() / total,
        area / mask.size,
        _average_precision(hits, ranked.ends),
    )
    iou = np.zeros(len(IOU_THRESHOLDS)) if is_empty else inside / (marked + area - inside)
    return np.array([*single, *iou])


def _average_precision(hits: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]) -> float:
    """scikit-learn's step-wise sum, from the hits among the first k pixels; ties enter at once."""
    found = hits[ends]
    gained = np.diff(found, prepend=0)
    return float((gained * (found / (ends + 1))).sum() / hits[-1])


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
        """All parts as one, sorted by key, so that it is the same however it was shared out."""
        keys = np.concatenate([np.empty(0, np.str_), *(part.keys for part in parts)])
        values = np.concatenate([_NONE, *(part.values for part in parts)])
        order = np.argsort(keys)
        return cls(keys[order], values[order])


_NONE = np.empty((0, len(MAPS), len(MEASURES)))


@dataclass(frozen=True, eq=False)
class FixedMaps:
    """The maps that are the same for every study."""

    ranked: Mapping[MapName, RankedMap]

    @classmethod
    def of(cls, prior: npt.NDArray[Any]) -> Self:
        """The three at the size of `prior` (S, S)."""
        size = len(prior)
        maps: dict[MapName, npt.NDArray[Any]] = {
            "prior": prior,
            "centre": centre_map(size),
            "uniform": uniform_map(size),
        }
        return cls({name: RankedMap.of(values) for name, values in maps.items()})

    def score(
        self,
        cam: npt.NDArray[np.float32],
        random: npt.NDArray[np.float32],
        boxes: Sequence[Box],
    ) -> Floats:
        """(MAPS, MEASURES) of one study, from its own two maps and these.

        Raises MetricError where the boxes cover no pixel's centre.
        """
        own: dict[MapName, RankedMap] = {"cam": RankedMap.of(cam), "random": RankedMap.of(random)}
        ranked = {**own, **self.ranked}
        return np.stack([score_map(ranked[name], boxes) for name in MAPS])


# --- a split --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MapSummary:
    """How one kind of map agrees with the boxes of many studies."""

    pointing: Estimate
    pointing_near: Estimate
    energy: Estimate
    """Mean over the maps that are not empty."""
    lift: Estimate
    """Mean energy / mean area: 1 is what a map without knowledge gets."""
    auprc: Estimate
    iou: Estimate
    """At `iou_threshold`."""
    iou_threshold: float | None
    """The share of the maximum of the best mean IoU on val; None where val could not tell."""
    iou_curve: Mapping[float, float]
    """Mean IoU by threshold."""
    empty: int
    """Maps that are 0 everywhere."""

    def to_json(self) -> dict[str, Any]:
        """The estimates by name."""
        return {
            "pointing": self.pointing.to_json(),
            "pointing_near": self.pointing_near.to_json(),
            "energy": self.energy.to_json(),
            "lift": self.lift.to_json(),
            "auprc": self.auprc.to_json(),
            "iou": {
                "threshold": self.iou_threshold,
                "chosen_on": "val",
                **self.iou.to_json(),
            },
            "iou_curve": {f"{t:.1f}": value for t, value in self.iou_curve.items()},
            "empty": self.empty,
        }


@dataclass(frozen=True)
class GroupSummary:
    """The maps of some studies: all positives, those found, or those missed."""

    n: int
    reason: str | None
    """Why there is no summary, where there is none."""
    area: Estimate | None = None
    """Share of the image that the boxes cover."""
    maps: Mapping[MapName, MapSummary] | None = None
    gain: Mapping[MapName, Mapping[str, Estimate]] | None = None
    """By baseline: how much more auprc, pointing and energy the network's maps have than it, study
    by study over the same resamples."""

    def to_json(self) -> dict[str, Any]:
        """`n`, and the summaries or null with the reason."""
        if self.maps is None or self.gain is None or self.area is None:
            return {"n": self.n, "maps": None, "reason": self.reason}
        return {
            "n": self.n,
            "area": self.area.to_json(),
            "maps": {name: summary.to_json() for name, summary in self.maps.items()},
            "gain": {
                name: {measure: found.to_json() for measure, found in gains.items()}
                for name, gains in self.gain.items()
            },
        }


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
    """Positives of train whose boxes made the prior map; of none it is uniform."""
    groups: Mapping[Group, GroupSummary]

    def to_json(self) -> dict[str, Any]:
        """The object `saliency` of metrics.json."""
        return {
            "positives": self.positives,
            "unscored": self.unscored,
            "checkpoint": self.checkpoint,
            "prior_studies": self.prior_studies,
            "pointing_tolerance": POINTING_TOLERANCE,
            **{name: group.to_json() for name, group in self.groups.items()},
        }


def choose_iou_thresholds(val: BoxScores) -> dict[MapName, float | None]:
    """For each kind of map, the IOU_THRESHOLDS' one of the best mean IoU on val; None where val
    has too few positives to say."""
    if len(val) < MIN_POSITIVES:
        return dict.fromkeys(MAPS)
    means = val.values[:, :, _IOU].mean(axis=0)
    return {name: IOU_THRESHOLDS[int(means[i].argmax())] for i, name in enumerate(MAPS)}


def summarise_saliency(
    scores: BoxScores,
    *,
    patient: npt.NDArray[np.str_],
    is_called: npt.NDArray[np.bool_] | str,
    positives: int,
    checkpoint: str,
    prior_studies: int,
    iou_thresholds: Mapping[MapName, float | None],
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
        part = BoxScores(scores.keys[chosen], scores.values[chosen])
        return _summarise_group(
            part, patient[chosen], iou_thresholds, resamples=resamples, seed=seed
        )

    return SaliencySummary(
        positives=positives,
        unscored=positives - len(scores),
        checkpoint=checkpoint,
        prior_studies=prior_studies,
        groups={name: summarise(chosen) for name, chosen in rows.items()},
    )


def _summarise_group(
    scores: BoxScores,
    patient: npt.NDArray[np.str_],
    iou_thresholds: Mapping[MapName, float | None],
    *,
    resamples: int,
    seed: int,
) -> GroupSummary:
    n = len(scores)
    if n == 0:
        return GroupSummary(0, "no such study with boxes")
    if n < MIN_POSITIVES:
        return GroupSummary(n, f"{n} studies with boxes, fewer than {MIN_POSITIVES}")
    statistics: dict[str, Statistic] = {"area": _mean(_column(scores, "uniform", "area"))}
    for name in MAPS:
        for measure, statistic in _statistics_of_map(scores, name, iou_thresholds[name]).items():
            statistics[f"{name}/{measure}"] = statistic
    for name in BASELINES:
        for measure in _GAINS:
            more = _column(scores, "cam", measure) - _column(scores, name, measure)
            statistics[f"gain/{name}/{measure}"] = _mean(more)
    found = patient_bootstrap(patient, statistics, resamples=resamples, seed=seed)
    return GroupSummary(
        n=n,
        reason=None,
        area=found["area"],
        maps={name: _summarise_map(scores, name, found, iou_thresholds[name]) for name in MAPS},
        gain={
            name: {measure: found[f"gain/{name}/{measure}"] for measure in _GAINS}
            for name in BASELINES
        },
    )


_GAINS = ("auprc", "pointing", "energy")


def _statistics_of_map(
    scores: BoxScores, name: MapName, iou_threshold: float | None
) -> dict[str, Statistic]:
    energy, area = _column(scores, name, "energy"), _column(scores, name, "area")
    statistics = {
        "pointing": _mean(_column(scores, name, "pointing")),
        "pointing_near": _mean(_column(scores, name, "pointing_near")),
        "energy": _mean(energy),
        "lift": _ratio(energy, np.where(np.isnan(energy), np.nan, area)),
        "auprc": _mean(_column(scores, name, "auprc")),
    }
    if iou_threshold is not None:
        statistics["iou"] = _mean(_column(scores, name, f"iou_{iou_threshold}"))
    return statistics


def _summarise_map(
    scores: BoxScores,
    name: MapName,
    found: Mapping[str, Estimate],
    iou_threshold: float | None,
) -> MapSummary:
    curve = scores.values[:, MAPS.index(name), _IOU].mean(axis=0)
    no_iou = Estimate.undefined("val has too few positives with boxes to choose a threshold")
    return MapSummary(
        pointing=found[f"{name}/pointing"],
        pointing_near=found[f"{name}/pointing_near"],
        energy=found[f"{name}/energy"],
        lift=found[f"{name}/lift"],
        auprc=found[f"{name}/auprc"],
        iou=found.get(f"{name}/iou", no_iou),
        iou_threshold=iou_threshold,
        iou_curve=dict(zip(IOU_THRESHOLDS, curve.tolist(), strict=True)),
        empty=int(np.isnan(_column(scores, name, "energy")).sum()),
    )


def _column(scores: BoxScores, name: MapName, measure: str) -> Floats:
    return scores.values[:, MAPS.index(name), MEASURES.index(measure)]


def _mean(values: Floats) -> Statistic:
    """The weighted mean of what is not NaN."""
    return _ratio(values, np.where(np.isnan(values), np.nan, 1.0))


def _ratio(numerator: Floats, denominator: Floats) -> Statistic:
    """Weighted sum over weighted sum, of what is not NaN; NaN where nothing is left."""
    above, below = np.nan_to_num(numerator), np.nan_to_num(denominator)

    def statistic(weights: Floats) -> Floats:
        total = below @ weights
        missing = np.full_like(total, np.nan)
        return np.divide(above @ weights, total, out=missing, where=total > 0)

    return statistic
