"""Baselines: how far a guess gets that looks at no pixel.

Portable AP images mostly are of sicker patients, so the view alone ranks RSNA's studies better than
chance (train says which view is the sicker one), and sex, age and pixel spacing add to it. A model
is worth what it adds to that.
"""

from collections.abc import Iterable, Mapping
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
from pneumo.evaluation import bootstrap, metrics
from pneumo.evaluation.bootstrap import (
    Estimate,
    Statistic,
    Statistics,
    StatisticSet,
    as_json,
)
from pneumo.evaluation.delong import PairedTest, delong_test
from pneumo.evaluation.operating_points import find_too_few
from pneumo.evaluation.predictions import Predictions, name_each

FEATURES = ("view", "sex", "age", "spacing_mm")
_RARE = 0.01
"""A pixel spacing of fewer of the studies of train counts as 'other'."""


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
        """That of predictions."""
        return cls(**{f.name: getattr(rows, f.name) for f in fields(cls)})

    @classmethod
    def of_split(cls, studies: Iterable[StudyRow], split: str) -> Self:
        """That of one split of a store, in the order of the rows."""
        rows = [row for row in studies if row.split == split]
        return cls(
            target=np.array([row.target for row in rows], dtype=np.int8),
            view=np.array([row.view or "" for row in rows], dtype=np.str_),
            sex=np.array([row.sex or "" for row in rows], dtype=np.str_),
            age=np.array([row.age for row in rows], dtype=np.float64),
            spacing_mm=np.array([row.spacing_mm for row in rows], dtype=np.float64),
        )

    def to_columns(self) -> npt.NDArray[np.object_]:
        """View, sex, age band, spacing to 0.001 mm as words, and the age in decades from 50."""
        known = ~np.isnan(self.age)
        bands = name_each(self.age, lambda age: name_age_band(None if np.isnan(age) else int(age)))
        spacing = name_each(self.spacing_mm, "{:.3f}".format)
        decades = np.where(known, (self.age - 50) / 10, 0.0)
        return np.array([self.view, self.sex, bands, spacing, decades], dtype=object).T


class _Indicators(OneHotEncoder):  # type: ignore[misc]
    """A column a value; a value that train never had has the mean of train's rows."""

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
        """The log odds (N,) of studies; a value that train never had counts as train's mean does.
        Raises MetricError where there is no model."""
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
    """That of `train`, AP where both have the same fraction; none without both views in it."""
    if train is None or len(train.target) == 0:
        return SickerView(None, "no metadata of train")
    positive = [train.target[train.view == view] for view in ("AP", "PA")]
    if min(map(len, positive)) == 0:
        return SickerView(None, "train: not both views are in it")
    return SickerView("AP" if positive[0].mean() >= positive[1].mean() else "PA")


def fit_metadata(train: Metadata | None) -> MetadataModel:
    """The baseline of `train`; without a study of either class in it there is none."""
    if train is None or len(train.target) == 0:
        return MetadataModel(0, None, "no metadata of train")
    n = len(train.target)
    if len(np.unique(train.target)) < 2:
        return MetadataModel(n, None, "train: one class only")
    words = [
        (
            _Indicators(
                min_frequency=_RARE, handle_unknown="infrequent_if_exist", sparse_output=False
            ),
            [column],
        )
        for column in range(4)
    ]
    pipeline = make_pipeline(
        make_column_transformer(*words, ("passthrough", [4])),
        LogisticRegression(solver="newton-cholesky", tol=1e-10, max_iter=1000),
    )
    pipeline.fit(train.to_columns(), train.target)
    return MetadataModel(n, pipeline)


@dataclass(frozen=True)
class Baseline:
    """The model compared with a guess from metadata, on the same studies."""

    n: int
    """Studies that the guess can be made for."""
    alone_auroc: Estimate
    """The guess's AUROC."""
    model_auroc: Estimate
    """The model's AUROC on the same studies."""
    gain: Estimate
    """model_auroc - alone_auroc, over the same resamples."""
    gain_delong: PairedTest


@dataclass(frozen=True)
class ViewBaseline:
    """How far the view alone gets (no pixel needed)."""

    n: int
    """Studies whose view is known."""
    sicker_view: Literal["AP", "PA"] | None
    """Which counts as positive: that with more positives in train."""
    view_only_auroc: Estimate
    """AUROC of 1 for `sicker_view`, 0 for the other."""
    model_auroc: Estimate
    """The model's AUROC on the same studies."""
    gain: Estimate
    """model_auroc - view_only_auroc, over the same resamples."""
    within: Mapping[str, Estimate]
    """The model's AUROC within AP and within PA, where the view is of no help."""
    gain_delong: PairedTest

    def to_json(self) -> dict[str, Any]:
        """The fields by name, `within` as `auroc_within_AP` and `auroc_within_PA`."""
        by_view = {f"auroc_within_{view}": found for view, found in self.within.items()}
        return {**as_json(self, leave_out={"within"}), **as_json(by_view)}


def view_statistics(rows: Predictions, sicker: SickerView, min_patients: int) -> Statistics:
    """What `compare_with_view` needs to have resampled; nothing where fewer than `min_patients`
    patients have a study of either class."""

    def compare() -> dict[str, Statistic]:
        if sicker.view is None:
            raise MetricError(sicker.reason or "no view")
        known = _find_enough(rows, rows.view != "", min_patients)
        return _both_aurocs(rows, known, rows.view == sicker.view)

    def within_view(view: str) -> dict[str, Statistic]:
        return {"auroc": _auroc(rows, _find_enough(rows, rows.view == view, min_patients))}

    return {
        "view": compare,
        "view/AP": lambda: within_view("AP"),
        "view/PA": lambda: within_view("PA"),
    }


def _find_enough(
    rows: Predictions, mask: npt.NDArray[np.bool_], min_patients: int
) -> npt.NDArray[np.bool_]:
    """The mask. Raises MetricError for too few patients of a class."""
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
    return ViewBaseline(
        n=len(known),
        sicker_view=sicker.view,
        view_only_auroc=found["view"].estimate("pair", 1),
        model_auroc=found["view"].estimate("pair", 0),
        gain=found["view"].difference("pair"),
        within={name: found[f"view/{name}"].estimate("auroc") for name in ("AP", "PA")},
        gain_delong=_test_gain(known, known.view == sicker.view, found["view"].reason),
    )


def metadata_statistics(rows: Predictions, model: MetadataModel, min_patients: int) -> Statistics:
    """What `compare_with_metadata` needs to have resampled; nothing as in `view_statistics`."""

    def compare() -> dict[str, Statistic]:
        score = model.score(rows)
        return _both_aurocs(rows, _find_enough(rows, rows.target >= 0, min_patients), score)

    return {"metadata": compare}


def compare_with_metadata(
    rows: Predictions, model: MetadataModel, found: Mapping[str, StatisticSet]
) -> Baseline:
    """The model compared with the metadata; an unknown value counts as a value of its own."""
    reason = found["metadata"].reason
    score = np.zeros(len(rows)) if reason is not None else model.score(rows)
    return Baseline(
        n=len(rows),
        alone_auroc=found["metadata"].estimate("pair", 1),
        model_auroc=found["metadata"].estimate("pair", 0),
        gain=found["metadata"].difference("pair"),
        gain_delong=_test_gain(rows, score, reason),
    )


def _test_gain(rows: Predictions, score: npt.NDArray[Any], reason: str | None) -> PairedTest:
    if reason is not None:
        return PairedTest(Estimate.undefined(reason), None)
    return delong_test(rows.target, rows.logit, score, rows.patient)


def _auroc(rows: Predictions, part: npt.NDArray[np.bool_]) -> Statistic:
    """The model's, of the studies of the mask."""
    ranking = metrics.Ranking.of(*metrics.check_scores(rows.target, rows.logit), part)
    return lambda weights: ranking.weigh(weights).auroc


def _both_aurocs(
    rows: Predictions, part: npt.NDArray[np.bool_], score: npt.NDArray[Any]
) -> dict[str, Statistic]:
    alone = metrics.few_values_auroc_statistic(rows.target, score, part)
    return {"pair": bootstrap.stack(_auroc(rows, part), alone)}
