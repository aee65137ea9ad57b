"""Baselines: how far a guess gets that looks at no pixel.

Portable AP images are of sicker patients, so the view alone ranks RSNA's studies better than
chance, and sex, age and pixel spacing add to it. A model is worth what it adds to that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

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
    within,
)
from pneumo.evaluation.delong import PairedTest, delong_test
from pneumo.evaluation.predictions import Predictions

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
        bands = [name_age_band(int(a) if k else None) for a, k in zip(self.age, known, strict=True)]
        spacing = [f"{mm:.3f}" for mm in self.spacing_mm]
        decades = np.where(known, (self.age - 50) / 10, 0.0)
        return np.array([self.view, self.sex, bands, spacing, decades], dtype=object).T


@dataclass(frozen=True, eq=False)
class MetadataModel:
    """Logistic regression on FEATURES, fitted on train: its patients are in no other split."""

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


def fit_metadata(train: Metadata | None) -> MetadataModel:
    """The baseline of `train`; without a study of either class in it there is none."""
    if train is None or len(train.target) == 0:
        return MetadataModel(0, None, "no metadata of train")
    n = len(train.target)
    if len(np.unique(train.target)) < 2:
        return MetadataModel(n, None, "train: one class only")
    words = OneHotEncoder(min_frequency=_RARE, handle_unknown="infrequent_if_exist")
    pipeline = make_pipeline(
        make_column_transformer((words, [0, 1, 2, 3]), ("passthrough", [4])),
        LogisticRegression(max_iter=1000),
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
    """How far the view alone gets: portable AP images are of sicker patients (no pixel needed)."""

    n: int
    """Studies whose view is known."""
    view_only_auroc: Estimate
    """AUROC of AP = 1, PA = 0."""
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


def view_statistics(rows: Predictions) -> Statistics:
    """What `compare_with_view` needs to have resampled."""
    known = np.flatnonzero(rows.view != "")
    return {
        "view": lambda: _both_aurocs(rows, known, rows.view[known] == "AP"),
        "view/AP": lambda: {"auroc": _auroc(rows, np.flatnonzero(rows.view == "AP"))},
        "view/PA": lambda: {"auroc": _auroc(rows, np.flatnonzero(rows.view == "PA"))},
    }


def compare_with_view(rows: Predictions, found: Mapping[str, StatisticSet]) -> ViewBaseline:
    """The model compared with the view, on the studies of `rows` whose view is known."""
    known = rows.take(rows.view != "")
    return ViewBaseline(
        n=len(known),
        view_only_auroc=found["view"].estimate("pair", 1),
        model_auroc=found["view"].estimate("pair", 0),
        gain=found["view"].difference("pair"),
        within={name: found[f"view/{name}"].estimate("auroc") for name in ("AP", "PA")},
        gain_delong=_test_gain(known, known.view == "AP", found["view"].reason),
    )


def metadata_statistics(rows: Predictions, model: MetadataModel) -> Statistics:
    """What `compare_with_metadata` needs to have resampled."""
    return {"metadata": lambda: _both_aurocs(rows, np.arange(len(rows)), model.score(rows))}


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


def _auroc(rows: Predictions, part: npt.NDArray[np.intp]) -> Statistic:
    return within(part, metrics.auroc_statistic(rows.target[part], rows.logit[part]))


def _both_aurocs(
    rows: Predictions, part: npt.NDArray[np.intp], score: npt.NDArray[Any]
) -> dict[str, Statistic]:
    alone = within(part, metrics.auroc_statistic(rows.target[part], score))
    return {"pair": bootstrap.stack(_auroc(rows, part), alone)}
