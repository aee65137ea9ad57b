"""Metrics of a model on the val split after an epoch, the same on every rank."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryStatScores

from pneumo.config import Config
from pneumo.errors import DataError
from pneumo.evaluation.logistic_regression import fit_logistic
from pneumo.evaluation.metrics import Confusion, auroc, rates
from pneumo.evaluation.predictions import sigmoid
from pneumo.evaluation.ranking import average_precision
from pneumo.loading.loader import Batch, Loader
from pneumo.network.scoring import Scores, score, scoring_batch_size
from pneumo.training.callbacks import Callbacks, Metrics
from pneumo.training.train_step import Learner


def validate(
    learner: Learner, data: Loader, config: Config, callbacks: Callbacks, *, image_size: int
) -> Metrics | None:
    """Metrics of the whole val split for the weights, and for their average with EMA; and
    `callbacks.extra_metrics` of the average's scores, without EMA of the weights'.

    None on every rank when one of them was asked to stop. Raises DataError unless each study was
    scored exactly once.
    """
    models = {"val/": learner.model}
    if learner.average is not None:
        models["val/ema_"] = learner.average.module
    # As much at once as training or an evaluation takes: there is room for it.
    batch_size = max(config.train.micro_batch_size, scoring_batch_size(image_size))
    found: Metrics = {}
    for prefix, model in models.items():
        batches = _StoppableBatches(data.evaluation(batch_size=batch_size), callbacks.should_stop)
        mine = score(model, batches)
        gathered = _gather(mine, batches.stopped, learner.world.size, len(data))
        if gathered is None:
            return None
        scores = gathered
        values = compute_metrics(mine, scores, float(learner.pos_weight), learner.device)
        found |= {f"{prefix}{name}": v if math.isfinite(v) else None for name, v in values.items()}
    return {**found, **callbacks.extra_metrics(scores)}


TWO_CLASS_METRICS = ("auroc", "average_precision", "brier", "calibration_slope")
"""Undefined where val has one class."""
THRESHOLD_METRICS = ("accuracy", "precision", "recall", "specificity")
"""At p >= 0.5."""


class _StoppableBatches:
    """Yields the batches until `should_stop`."""

    def __init__(self, batches: Iterator[Batch], should_stop: Callable[[], bool]) -> None:
        self.batches, self.should_stop = batches, should_stop
        self.stopped = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch
            if self.should_stop():
                self.stopped = True
                return


def _gather(mine: Scores, stopped: bool, num_ranks: int, count: int) -> Scores | None:
    """All ranks' scores of a split of `count` samples, in the store's order, which is the order of
    the ranks; None when a rank was asked to stop. Raises DataError unless each sample is there
    exactly once."""
    parts: list[Any] = [(mine, stopped)]
    if num_ranks > 1:
        # Always: a rank that was not asked to stop learns it from the others here.
        parts = [None] * num_ranks
        dist.all_gather_object(parts, (mine, stopped))
    if any(has_stopped for _, has_stopped in parts):
        return None
    found = Scores.join([part for part, _ in parts])
    studies = len(np.unique(found.keys))
    if len(found) != count or studies != count:
        raise DataError(f"val: {len(found)} scores of {studies} studies, expected {count} once")
    return found


def compute_metrics(
    mine: Scores, scores: Scores, pos_weight: float, device: torch.device
) -> dict[str, float]:
    """loss, TWO_CLASS_METRICS and THRESHOLD_METRICS over all ranks. NaN where undefined: AUROC of
    one class, precision without a positive call, all but loss where a logit is not finite.

    `mine` are this rank's scores, `scores` those of all ranks. torchmetrics sums loss and counts
    over the ranks of a process group, on `device`. AUROC is that of `evaluation.metrics`, from the
    logits: torchmetrics' applies a sigmoid in float32, which makes large logits equal.
    """
    logits, targets = torch.from_numpy(mine.logits).double(), torch.from_numpy(mine.targets)
    losses = F.binary_cross_entropy_with_logits(
        logits,
        targets.double(),
        pos_weight=torch.tensor(pos_weight, dtype=torch.float64),
        reduction="none",
    )
    # `set_dtype` after `to`, which would reset it to float32.
    loss = MeanMetric(nan_strategy="disable").to(device).set_dtype(torch.float64)
    counts = BinaryStatScores(validate_args=False).to(device)
    loss.update(losses.to(device))
    # Thresholded here, as torchmetrics counts a probability of exactly 0.5 as negative; of shape
    # (1, N), as it cannot reshape the empty slice of a rank.
    counts.update((logits >= 0).long()[None].to(device), targets.long()[None].to(device))
    found = {"loss": float(loss.compute())}
    tp, fp, tn, fn, _ = (int(count) for count in counts.compute())
    if not np.isfinite(scores.logits).all():
        return found | dict.fromkeys((*TWO_CLASS_METRICS, *THRESHOLD_METRICS), math.nan)
    by_name = rates(Confusion(tp, fp, fn, tn))
    has_both = 0 < tp + fn < len(scores)
    found |= _two_class_metrics(scores) if has_both else dict.fromkeys(TWO_CLASS_METRICS, math.nan)
    return found | {name: by_name[name] for name in THRESHOLD_METRICS}


def _two_class_metrics(scores: Scores) -> dict[str, float]:
    target, logit = scores.targets.astype(float), scores.logits.astype(float)
    slope, _ = fit_logistic(logit, target, np.ones((len(logit), 1)))
    return {
        "auroc": auroc(scores.targets, scores.logits),
        "average_precision": average_precision(target, logit),
        "brier": float(np.mean((sigmoid(logit) - target) ** 2)),
        "calibration_slope": float(slope[0]),
    }
