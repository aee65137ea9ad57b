"""Computes a trial's objective on val after each epoch, records it in the trial's folder, and only
then reports it to Tune.

So every decision of Tune is based on recorded values, and an interrupted trial or search resumes
from the record.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray
import ray.exceptions
import ray.train

from jobs.tuning.trial_records import read_history, write_scores, write_started
from pneumo.config import TuneConfig
from pneumo.errors import DivergedError, MetricError
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.sample_order import World
from pneumo.network.scoring import Scores
from pneumo.training.callbacks import Callbacks, Epoch, Start
from pneumo.training.checkpoint_writer import write_history
from pneumo.tuning.objective import chance_level, estimate_objective, smooth
from pneumo.tuning.trials import ERROR, OBJECTIVE

METRIC = "objective"
"""The metric that Tune maximises."""
WARNING = "warning"
"""Key of a warning about a trial's initial weights, for the user."""
_FETCH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class SharedTrialData:
    """Data that all trials of a search share; by references, so that each node has one copy."""

    tune: TuneConfig
    prevalence: float
    """Fraction of positives in val."""
    stored_size: int
    """Image size of the store, in pixels."""
    patients: Any
    """Reference to the patient of each study of val, by key."""
    splits: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """References to the splits in memory, by image size and name."""
    workers_per_node: int = 1
    """How many workers of trials a node may run at a time, at most: they share its memory."""

    def extend(self, callbacks: Callbacks, trial_url: str, world: World) -> Callbacks:
        """`callbacks` of a training that also compute each epoch's objective and report it."""
        return TrialJudge(self, trial_url, world).callbacks(callbacks, ray.train.report)

    def trainings_beside(self, local_size: int) -> int:
        """How many trials may run on a node at a time that runs `local_size` workers of one."""
        return max(1, math.ceil(self.workers_per_node / local_size))

    def fetch_splits(self, image_size: int | None) -> dict[str, InMemorySplit]:
        """The splits of this image size (None: the store's) that are in shared memory; empty where
        Ray has lost them, and `fit` then reads them itself."""
        references = self.splits.get(image_size or self.stored_size, {})
        try:
            return {n: ray.get(r, timeout=_FETCH_TIMEOUT_S) for n, r in references.items()}
        except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
            return {}


class TrialJudge:
    """Computes and records the objective of one trial, on one rank."""

    def __init__(self, shared: SharedTrialData, trial_url: str, world: World) -> None:
        self.shared, self.trial_url, self.world = shared, trial_url, world
        self.history: list[Mapping[str, float | None]] = []
        self._warning: str | None = None
        self._patients: Mapping[str, str] = ray.get(shared.patients)

    def callbacks(self, callbacks: Callbacks, report: Any) -> Callbacks:
        """`callbacks` of a training that also compute each epoch's objective and `report` it."""
        return replace(
            callbacks,
            on_start=self._begin,
            extra_metrics=self._judge,
            on_epoch=lambda epoch: report(self._record(epoch)),
        )

    def read_result(self) -> dict[str, Any] | None:
        """The result of a trial that had all its epochs before it was restarted, else None."""
        history = read_history(self.trial_url)
        if len(history) < self.shared.tune.epochs:
            return None
        self.history = list(history)
        return self._describe()

    def fail(self, error: DivergedError) -> dict[str, Any]:
        """The result of a setting that cannot be trained: it is scored at chance level, so that the
        sampler avoids it and the search goes on."""
        return {
            "epoch": max(len(self.history), 1),
            METRIC: chance_level(self.shared.tune, self.shared.prevalence),
            "error": str(error),
        }

    def _begin(self, start: Start) -> None:
        self.history = list(start.history)
        is_new = not start.history and not start.step  # else it resumes from its own checkpoint
        if is_new and self.world.rank == 0:
            write_started(self.trial_url, start.initialisation)
        if start.initialisation.fell_back:
            self._warning = start.initialisation.message

    def _judge(self, scores: Scores) -> dict[str, float | None]:
        patients = np.array([self._patients[key] for key in scores.keys])
        try:
            estimate = estimate_objective(scores.targets, scores.logits, patients, self.shared.tune)
        except MetricError as error:
            raise DivergedError(f"val after epoch {len(self.history) + 1}: {error}") from error
        # Before any record of the last epoch, with which the trial counts as finished.
        if self.world.rank == 0 and len(self.history) + 1 == self.shared.tune.epochs:
            write_scores(self.trial_url, scores, self._patients)
        return {OBJECTIVE: estimate.value, ERROR: estimate.standard_error}

    def _record(self, epoch: Epoch) -> dict[str, Any]:
        self.history.append(epoch.metrics)
        if self.world.rank == 0:
            write_history(self.trial_url, self.history)
        return self._describe()

    def _describe(self) -> dict[str, Any]:
        values = [record[OBJECTIVE] for record in self.history]
        known = [value for value in values if value is not None]
        last = {name: value for name, value in self.history[-1].items() if value is not None}
        return {
            **last,
            **({} if self._warning is None else {WARNING: self._warning}),
            "epoch": len(self.history),
            METRIC: smooth(known, self.shared.tune.smoothing_epochs),
        }
