"""Baselines: how well metadata alone predict, without any pixel.

Portable AP images are mostly of sicker patients, so the view alone ranks RSNA's studies better than
chance, and sex, age and pixel spacing improve on it. A model is worth what it adds to that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from pneumo.dataset.quality import name_age_band
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import MetricError
from pneumo.evaluation import bootstrap
from pneumo.evaluation.bootstrap import Statistic, StatisticBuilders, StatisticSet
from pneumo.evaluation.delong import PairedTest, delong_test
from pneumo.evaluation.estimates import Estimate, Floats, as_json
from pneumo.evaluation.operating_points import find_too_few
from pneumo.evaluation.predictions import Predictions, name_each, to_column
from pneumo.evaluation.ranking import auroc_statistic

FEATURES = ("view", "sex", "age", "spacing_mm")
_RARE = 0.01
"""A value of a smaller fraction of train counts as 'other'."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """What is known of studies besides their pixels; all arrays have shape (N,)."""

    target: npt.NDArray[np.int8]
    view: npt.NDArray[np.str_]
    sex: npt.NDArray[np.str_]
    age: npt.NDArray[np.float64]
    """Years; NaN where unknown."""
    spacing_mm: npt.NDArray[np.float64]
    """NaN where unknown."""

    @classmethod
    def of(cls, rows: Predictions) -> Self:
        """The metadata of predictions."""
        return cls(**{f.name: getattr(rows, f.name) for f in fields(cls)})

    @classmethod
    def of_split(cls, studies: Iterable[StudyRow], split: str) -> Self:
        """The metadata of one split of a store, in the order of `studies`."""
        rows = [row for row in studies if row.split == split]
        return cls(**{f.name: to_column(rows, f.name) for f in fields(cls)})

    def to_columns(self) -> npt.NDArray[np.object_]:
        """View, sex, age band, spacing rounded to 0.001 mm, and (age - 50) / 10: (N, 5)."""
        known = ~np.isnan(self.age)
        bands = name_each(self.age, lambda age: name_age_band(None if np.isnan(age) else int(age)))
        spacing = name_each(self.spacing_mm, "{:.3f}".format)
        decades = np.where(known, (self.age - 50) / 10, 0.0)
        return np.array([self.view, self.sex, bands, spacing, decades], dtype=object).T


class _Indicators(OneHotEncoder):  # type: ignore[misc]
    """One-hot encoding; a value that is not in train is encoded as the mean of train's rows."""

    def fit(self, X: npt.NDArray[np.object_], y: object = None) -> Self:  # noqa: N803
        super().fit(X)
        self.mean_ = super().transform(X).mean(axis=0)
        return self

    def transform(self, X: npt.NDArray[np.object_]) -> npt.NDArray[np.float64]:  # noqa: N803
        found = np.asarray(super().transform(X))
        found[found.sum(axis=1) == 0] = self.mean_
        return found


@dataclass(frozen=True, eq=False)
class MetadataModel:
    """Logistic regression on FEATURES, fitted on train."""

    n: int
    """Studies that it was fitted on."""
    pipeline: Pipeline | None
    reason: str | None = None
    """Why there is none."""

    def score(self, rows: Predictions) -> npt.NDArray[np.float64]:
        """The log odds (N,) of studies. Raises MetricError where there is no model."""
        if self.pipeline is None:
            raise MetricError(self.reason or "no metadata")
        if len(rows) == 0:
            raise MetricError("no study")
        found = self.pipeline.decision_function(Metadata.of(rows).to_columns())
        return np.asarray(found, dtype=np.float64)


@dataclass(frozen=True)
class SickerView:
    """Which view has more positives in train."""

    view: Literal["AP", "PA"] | None
    reason: str | None = None
    """Why there is none."""


def find_sicker_view(train: Metadata | None) -> SickerView:
    """The view with the larger fraction of positives in `train`, AP where they are equal; none
    where a view is missing."""
    if train is None or len(train.target) == 0:
        return SickerView(None, "no metadata of train")
    positive = [train.target[train.view == view] for view in ("AP", "PA")]
    if min(map(len, positive)) == 0:
        return SickerView(None, "train: not both views are in it")
    return SickerView("AP" if positive[0].mean() >= positive[1].mean() else "PA")


def fit_metadata(train: Metadata | None) -> MetadataModel:
    """The model fitted on `train`; none where a class is missing, or all metadata are equal."""
    if train is None or len(train.target) == 0:
        return MetadataModel(0, None, "no metadata of train")
    n = len(train.target)
    if len(np.unique(train.target)) < 2:
        return MetadataModel(n, None, "train: one class only")
    columns = train.to_columns()
    if (columns == columns[0]).all():
        return MetadataModel(n, None, "train: no metadata, or the same of all studies")
    indicators = _Indicators(
        min_frequency=_RARE, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    categories = [(indicators, [column]) for column in range(4)]  # it is copied for each
    pipeline = make_pipeline(
        make_column_transformer(*categories, ("passthrough", [4])),
        LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=1000),
    )
    pipeline.fit(columns, train.target)
    return MetadataModel(n, pipeline)


@dataclass(frozen=True)
class Baseline:
    """The model compared with what is known without any pixel, on the same studies."""

    n: int
    """Studies of which it is known."""
    alone_auroc: Estimate
    """AUROC of it alone."""
    model_auroc: Estimate
    """The model's AUROC on the same studies."""
    gain: Estimate
    """model_auroc - alone_auroc, over the same resamples."""
    gain_delong: PairedTest


@dataclass(frozen=True)
class ViewBaseline(Baseline):
    """The model compared with the view alone: 1 for `sicker_view`, 0 for the other."""

    sicker_view: Literal["AP", "PA"] | None
    """The view that counts as positive: that with the larger fraction of positives in train."""
    within: Mapping[str, Estimate]
    """The model's AUROC within AP and within PA, where the view cannot help."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name, `alone_auroc` as `view_only_auroc`, `within` as `auroc_within_AP` and
        `auroc_within_PA`."""
        by_view = {f"auroc_within_{view}": found for view, found in self.within.items()}
        named = {"view_only_auroc": self.alone_auroc, **by_view}
        return {**as_json(self, leave_out={"alone_auroc", "within"}), **as_json(named)}


def view_statistics(rows: Predictions, sicker: SickerView, min_patients: int) -> StatisticBuilders:
    """What `compare_with_view` needs to have resampled; nothing where fewer than `min_patients`
    patients have a study of a class."""

    def compare() -> dict[str, Statistic]:
        if sicker.view is None:
            raise MetricError(sicker.reason or "no view")
        known = _find_enough(rows, rows.view != "", min_patients)
        return _both_aurocs(rows, rows.view == sicker.view, known)

    def within_view(view: str) -> dict[str, Statistic]:
        part = _find_enough(rows, rows.view == view, min_patients)
        return {"auroc": auroc_statistic(rows.target, rows.logit, part)}

    return {
        "view": compare,
        "view/AP": lambda: within_view("AP"),
        "view/PA": lambda: within_view("PA"),
    }


def _find_enough(
    rows: Predictions, mask: npt.NDArray[np.bool_], min_patients: int
) -> npt.NDArray[np.bool_]:
    """`mask`, unchanged. Raises MetricError where it has too few patients of a class."""
    if not mask.any():
        raise MetricError("no study")
    for value in (1, 0):
        if reason := find_too_few(rows, value, min_patients, mask):
            raise MetricError(reason)
    return mask


def compare_with_view(
    rows: Predictions, sicker: SickerView, found: Mapping[str, StatisticSet]
) -> ViewBaseline:
    """The model compared with the view, on the studies of `rows` whose view is known."""
    known = rows.take(rows.view != "")
    part = found["view"].with_size(known.count_rarer_class())
    within = {}
    for name in ("AP", "PA"):
        size = rows.count_rarer_class(rows.view == name)
        within[name] = found[f"view/{name}"].with_size(size).estimate("auroc")
    return ViewBaseline(
        **vars(_compare(known, known.view == sicker.view, part)),
        sicker_view=sicker.view,
        within=within,
    )


def metadata_statistics(
    rows: Predictions, score: Callable[[], Floats], min_patients: int
) -> StatisticBuilders:
    """What `compare_with_metadata` needs to have resampled; nothing as in `view_statistics`.

    `score` gives `MetadataModel.score` of `rows`.
    """

    def compare() -> dict[str, Statistic]:
        everybody = _find_enough(rows, np.ones(len(rows), dtype=np.bool_), min_patients)
        return _both_aurocs(rows, score(), everybody)

    return {"metadata": compare}


def compare_with_metadata(
    rows: Predictions, score: Callable[[], Floats], found: Mapping[str, StatisticSet]
) -> Baseline:
    """The model compared with the metadata; 'unknown' is a value like any other."""
    part = found["metadata"]
    return _compare(rows, np.zeros(len(rows)) if part.reason is not None else score(), part)


def _compare(rows: Predictions, score: npt.NDArray[Any], part: StatisticSet) -> Baseline:
    """The model compared with a `score` (N,) of its studies."""
    if part.reason is None:
        gain_delong = delong_test(rows.target, rows.logit, score, rows.patient)
    else:
        gain_delong = PairedTest(Estimate.undefined(part.reason), None)
    return Baseline(
        n=len(rows),
        alone_auroc=part.estimate("pair", 1),
        model_auroc=part.estimate("pair", 0),
        gain=part.difference("pair"),
        gain_delong=gain_delong,
    )


def _both_aurocs(
    rows: Predictions, score: npt.NDArray[Any], part: npt.NDArray[np.bool_]
) -> dict[str, Statistic]:
    """The AUROCs of the model and of a `score` (N,), on the studies of a mask."""
    both = (auroc_statistic(rows.target, one, part) for one in (rows.logit, score))
    return {"pair": bootstrap.stack(*both)}
