"""Predictions: a model's score of each study.

Metrics, figures and report can be computed again from them without a GPU and without images, except
the Grad-CAM gallery.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit

from pneumo.dataset.study_table import StudyRow, encode_parquet
from pneumo.errors import DataError
from pneumo.evaluation.estimates import Floats, count_equal_patients
from pneumo.images.boxes import Box
from pneumo.network.scoring import Scores

StrArray = npt.NDArray[np.str_]

SCORING = "pneumo.scoring"
"""Key of the Parquet metadata that says how the logits were made."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """A row for each study; all arrays have shape (N,)."""

    key: StrArray
    """The study's keyed hash."""
    patient: StrArray
    """The patient's keyed hash; equal for studies of one patient."""
    split: StrArray
    """'train', 'val' or 'test'."""
    target: npt.NDArray[np.int8]
    """1 for pneumonia (`Lung Opacity`), 0 otherwise."""
    logit: npt.NDArray[np.float32]
    """The network's output."""
    probability: npt.NDArray[np.float64]
    """sigmoid(logit) in float64: in float32 all large logits become 1 and lose their order."""
    calibrated_probability: npt.NDArray[np.float64]
    """The probability after calibration on val; NaN without a calibration."""
    checkpoint: StrArray
    """Name of the checkpoint that gave the logit."""
    finding: StrArray
    """The study's detailed class."""
    age: npt.NDArray[np.float64]
    """Years; NaN where unknown or implausible."""
    sex: StrArray
    """'M', 'F' or '' where unknown."""
    view: StrArray
    """'AP', 'PA' or '' where unknown."""
    spacing_mm: npt.NDArray[np.float64]
    """Distance of two pixels of the original image; NaN where unknown."""
    box_area_fraction: npt.NDArray[np.float64]
    """Fraction of the image that lies in a radiologist's box; NaN without one."""

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.key)

    def take(self, rows: npt.NDArray[Any]) -> Self:
        """The given rows, by index or by mask."""
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def subset(self, split: str) -> Self:
        """The rows of one split."""
        return self.take(self.split == split)

    def count_patients(self, part: npt.NDArray[np.bool_]) -> int:
        """The number of patients in a mask (N,) of studies."""
        patients = self.patient[part]
        if patients.dtype.kind == "i":
            return int(np.count_nonzero(np.bincount(patients)))
        return len(np.unique(patients))

    def count_by_class(self, part: npt.NDArray[np.bool_] | None = None) -> tuple[int, int]:
        """The number of patients with a negative study, and with a positive one, in a mask (N,)."""
        masks = (self.target == value for value in (0, 1))
        negative, positive = (
            self.count_patients(mask if part is None else mask & part) for mask in masks
        )
        return negative, positive

    def count_equal_patients(self, part: npt.NDArray[np.bool_]) -> int:
        """The sample size of a mask (N,) of studies, see `estimates.count_equal_patients`."""
        return count_equal_patients(self.patient[part])

    def count_rarer_class(self, part: npt.NDArray[np.bool_] | None = None) -> int:
        """The sample size of the class that has the smaller one, in a mask (N,)."""
        everybody = np.ones(len(self), dtype=np.bool_) if part is None else part
        sizes = (self.count_equal_patients(everybody & (self.target == value)) for value in (0, 1))
        return min(filter(None, sizes), default=0)

    def with_integer_keys(self) -> Self:
        """The same with integers for the keys of patients, in their order, and of studies: they are
        faster to compare."""
        numbers: dict[str, npt.NDArray[Any]] = {
            "key": np.arange(len(self)),
            "patient": np.unique(self.patient, return_inverse=True)[1],
            "checkpoint": np.zeros(len(self), dtype=np.int8),
        }
        return replace(self, **numbers)

    def to_parquet(self, scoring: Mapping[str, Any] | None = None) -> bytes:
        """The table as a Parquet file; `scoring`, how the logits were made, as its metadata."""
        table = pa.table({f.name: getattr(self, f.name) for f in fields(self)})
        if scoring is not None:
            table = table.replace_schema_metadata({SCORING: json.dumps(scoring)})
        return encode_parquet(table)

    @classmethod
    def from_parquet(cls, data: bytes) -> Self:
        """The table that `to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        return cls(**{name: np.array(table[name].to_pylist(), t) for name, t in _DTYPES.items()})


_OF_STUDIES = ("key", "patient", "split", "target", "finding", "age", "sex", "view", "spacing_mm")
_NUMBERS = ("probability", "calibrated_probability", "age", "spacing_mm", "box_area_fraction")
_DTYPES: dict[str, Any] = {
    **dict.fromkeys(("key", "patient", "split", "checkpoint", "finding", "sex", "view"), np.str_),
    **dict.fromkeys(_NUMBERS, np.float64),
    "target": np.int8,
    "logit": np.float32,
}


def name_each(values: Floats, name: Callable[[float], str]) -> StrArray:
    """The name of each value (N,), for values of which few differ; NaN gets a name too."""
    found, index = np.unique(values, return_inverse=True)
    return np.array([name(value) for value in found.tolist()], dtype=np.str_)[index]


def sigmoid(logit: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """1 / (1 + exp(-logit)) in float64, without overflow; same shape."""
    return np.asarray(expit(np.asarray(logit, dtype=np.float64)))


def join_predictions(
    scored: Scores, studies: Mapping[str, StudyRow], *, checkpoint: str, image_size: int
) -> Predictions:
    """Scores and what is known of the studies, sorted by split and key.

    `checkpoint` names the checkpoint of the logits; `image_size` is the height and width of the
    stored images, the boxes' pixels. Raises DataError when a scored study is unknown, scored twice,
    or has another target in its shard than in `studies`.
    """
    _check_scores(scored, studies)
    keys = scored.keys.tolist()
    order = sorted(range(len(keys)), key=lambda i: (studies[keys[i]].split, keys[i]))
    rows = [studies[keys[i]] for i in order]
    logit = scored.logits[order] if order else np.empty(0, dtype=np.float32)
    areas = [cover_boxes(row.boxes) / image_size**2 if row.boxes else np.nan for row in rows]
    return Predictions(
        **{name: to_column(rows, name) for name in _OF_STUDIES},
        logit=logit,
        probability=sigmoid(logit),
        calibrated_probability=np.full(len(rows), np.nan),
        checkpoint=np.full(len(rows), checkpoint),
        box_area_fraction=np.array(areas, dtype=np.float64),
    )


def to_column(rows: Sequence[StudyRow], name: str) -> npt.NDArray[Any]:
    """A column of `Predictions` from a store's rows: (N,); an unknown text is '', a number NaN."""
    values = [getattr(row, name) for row in rows]
    if _DTYPES[name] is np.str_:
        values = [value or "" for value in values]
    return np.array(values, dtype=_DTYPES[name])


def _check_scores(scored: Scores, studies: Mapping[str, StudyRow]) -> None:
    keys = scored.keys.tolist()
    unknown = sum(key not in studies for key in keys)
    if unknown:
        raise DataError(f"predictions: {unknown} scored studies are not in studies.parquet")
    if twice := len(keys) - len(set(keys)):
        raise DataError(f"predictions: {twice} studies are scored more than once")
    other = sum(
        studies[key].target != target
        for key, target in zip(keys, scored.targets.tolist(), strict=True)
    )
    if other:
        raise DataError(
            f"predictions: {other} of {len(keys)} scored studies have another target in their "
            "shard than in studies.parquet; delete the store and prepare it again"
        )


def check_complete(predictions: Predictions, expected: Mapping[str, int]) -> None:
    """Raise DataError where a study is missing, or of another split than those of `expected`, the
    manifest's count of each. That none is scored twice, `join_predictions` checks.
    """
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


def find_fault(rows: Predictions) -> str | None:
    """Why no metric may be computed of these predictions; None where all are usable.

    One unusable prediction is enough: leaving out the studies that a model fails on would flatter
    it.
    """
    unusable = len(rows) - int(np.isfinite(rows.logit).sum())
    duplicates = len(rows) - len(np.unique(rows.key))
    without_key = int((rows.key == "").sum())
    without_patient = int((rows.patient == "").sum())
    if len(rows) == 0:
        return "no study"
    if without_key or without_patient:
        return f"{without_key} studies have no key and {without_patient} no patient"
    if duplicates:
        return f"{duplicates} studies are scored more than once"
    if unusable:
        return f"{unusable} of {len(rows)} scores are NaN or infinite"
    return None


def cover_boxes(boxes: Sequence[Box]) -> float:
    """The area of the union of the boxes, in square pixels."""
    edges_x = sorted({x for box in boxes for x in (box.x, box.x + box.width)})
    edges_y = sorted({y for box in boxes for y in (box.y, box.y + box.height)})
    return sum(
        (right - left) * (bottom - top)
        for left, right in pairwise(edges_x)
        for top, bottom in pairwise(edges_y)
        if any(
            box.x <= left < box.x + box.width and box.y <= top < box.y + box.height for box in boxes
        )
    )
