"""How well saliency maps agree with the radiologists' boxes, compared with two baselines.

Every measure takes a map (H, W) of values of at least 0 and boxes in its pixels, and none depends
on the map's scale. Even a map that ignores the image agrees with boxes, because pneumonia is in the
lungs and the lungs are in the middle. So each measure of the network's maps is compared with that
of

    prior     the fraction of the positives in train with a box at the pixel
    random    Grad-CAM of the same network with random weights (Adebayo 2018)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import resample
from pneumo.evaluation.estimates import (
    Estimate,
    Floats,
    as_json,
    count_equal_patients,
    subtract,
    with_wilson,
)
from pneumo.evaluation.metrics import mean_of_known_statistic
from pneumo.images.boxes import Box

MapName = Literal["cam", "prior", "random"]
MAPS: tuple[MapName, ...] = get_args(MapName)
BASELINES: tuple[MapName, ...] = MAPS[1:]

Measure = Literal["auprc", "pointing", "energy"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""The columns of `BoxScores.values`:

auprc       average precision of the map as a classifier of the boxes' pixels (Arun 2021)
pointing    fraction of the map's maximal pixels that lie in a box: 0 or 1 except for ties; 0 for
            an empty map (the pointing game, Zhang 2018)
energy      fraction of the map's sum that lies in the boxes; NaN for an empty map (Wang 2020)
"""
MIN_POSITIVES = 5
"""Studies that a summary needs at least."""
NO_PRIOR = "train has no boxes, so there is no fixed map to compare with"


def scale_boxes(boxes: Sequence[Box], *, stored_size: int, image_size: int) -> tuple[Box, ...]:
    """Boxes in pixels of the stored image, converted to pixels of the network's input."""
    ratio = image_size / stored_size
    return tuple(Box(*(value * ratio for value in box)) for box in boxes)


def box_mask(shape: Sequence[int], boxes: Sequence[Box]) -> npt.NDArray[np.bool_]:
    """(H, W): whether a pixel's centre lies in a box."""
    height, width = shape
    row, column = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    mask = np.zeros((height, width), dtype=np.bool_)
    for x, y, box_width, box_height in boxes:
        in_rows = (row >= y) & (row < y + box_height)
        mask |= in_rows & (column >= x) & (column < x + box_width)
    return mask


def prior_map(boxes_of_train: Sequence[Sequence[Box]], image_size: int) -> Floats:
    """(S, S): the fraction of the positives in train whose boxes cover a pixel.

    `boxes_of_train` has the boxes of each positive, in pixels of the map. Without any the map is 1
    everywhere.
    """
    total = np.zeros((image_size, image_size))
    for boxes in boxes_of_train:
        total += box_mask(total.shape, boxes)
    return total / len(boxes_of_train) if total.any() else np.ones_like(total)


def score_map(values: npt.NDArray[Any], boxes: Sequence[Box]) -> Floats:
    """The MEASURES of a map (H, W) and the boxes of its study: (3,).

    Raises MetricError where the boxes cover no pixel's centre, or the map has a NaN, an infinity or
    a negative value.
    """
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise MetricError("a saliency map has a negative value, a NaN or an infinity")
    mask = box_mask(values.shape, boxes)
    if not mask.any():
        raise MetricError(f"no box covers a pixel of the map of shape {values.shape}")
    from sklearn.metrics import average_precision_score  # takes a second to import

    auprc = average_precision_score(mask.ravel(), values.ravel())
    total, greatest = values.sum(dtype=np.float64), values.max()
    if greatest == 0:
        return np.array([auprc, 0.0, np.nan])
    pointing = mask[values == greatest].mean()
    return np.array([auprc, pointing, values[mask].sum(dtype=np.float64) / total])


@dataclass(frozen=True, eq=False)
class BoxScores:
    """The measures of all maps of some positives."""

    keys: npt.NDArray[np.str_]
    """(N,): the studies."""
    values: Floats
    """(N, MAPS, MEASURES)."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All parts, sorted by key: the result does not depend on how the work was split."""
        nothing = np.empty((0, len(MAPS), len(MEASURES)))
        keys = np.concatenate([np.empty(0, np.str_), *(part.keys for part in parts)])
        values = np.concatenate([nothing, *(part.values for part in parts)])
        order = np.argsort(keys)
        return cls(keys[order], values[order])

    def column(self, name: MapName, measure: Measure) -> Floats:
        """One measure of one kind of map: (N,)."""
        return self.values[:, MAPS.index(name), MEASURES.index(measure)]


@dataclass(frozen=True)
class MapSummary:
    """The agreement of one kind of map with the boxes of many studies."""

    auprc: Estimate
    pointing: Estimate
    energy: Estimate
    """Mean over the maps that are not empty."""
    empty: int
    """Number of maps that are 0 everywhere."""


@dataclass(frozen=True)
class GroupSummary:
    """The maps of all positives, of the true positives, or of the false negatives."""

    n: int
    reason: str | None
    """Why there is no summary; None where there is one."""
    maps: Mapping[MapName, MapSummary] | None = None
    gain: Mapping[MapName, Mapping[Measure, Estimate]] | None = None
    """By baseline: the measures of the network's maps minus those of the baseline, on the same
    studies and resamples."""

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
    """Number of positives in the split."""
    unscored: int
    """Positives without a box that covers a pixel of the input, or whose map has a NaN."""
    checkpoint: str
    """The checkpoint of the maps."""
    prior_studies: int
    """Positives in train whose boxes made the prior map; with 0 its estimates are undefined."""
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

    `patient` (N,) and `is_called` (N,) belong to the rows of `scores`: the patient, and whether the
    study is called positive, or why there is no threshold. `positives` and `prior_studies` as in
    `SaliencySummary`.
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
        has_prior = prior_studies > 0
        return _summarise_group(group, patient[chosen], has_prior, resamples=resamples, seed=seed)

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
    has_prior: bool,
    *,
    resamples: int,
    seed: int,
) -> GroupSummary:
    n = len(scores)
    if n == 0:
        return GroupSummary(0, "no such study with boxes")
    if n < MIN_POSITIVES:
        return GroupSummary(n, f"{n} studies with boxes, fewer than {MIN_POSITIVES}")
    columns: dict[str, Floats] = {}
    for measure in MEASURES:
        own = scores.column("cam", measure)
        for name in MAPS:
            other = scores.column(name, measure)
            columns[f"{name}/{measure}"] = other
            columns[f"gain/{name}/{measure}"] = own - other
    statistics = {key: mean_of_known_statistic(values) for key, values in columns.items()}
    resampled = resample(
        patient, statistics, resamples=resamples, seed=seed, effective_patients=len(patient)
    )
    found = {}
    for key, values in columns.items():
        known = patient[~np.isnan(values)]
        size = count_equal_patients(known)
        found[key] = replace(resampled[key], effective_patients=size).estimate()
        if key.endswith("/pointing") and not key.startswith("gain/"):
            found[key] = with_wilson(found[key], len(np.unique(known)))
    for name in BASELINES:
        both = found["cam/pointing"], found[f"{name}/pointing"]
        if {0.0, 1.0} & {one.value for one in both}:
            found[f"gain/{name}/pointing"] = subtract(*both)
    if not has_prior:
        found |= {name: Estimate.undefined(NO_PRIOR) for name in found if "prior/" in name}
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
