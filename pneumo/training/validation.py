"""How good a model is on the val split after an epoch, the same on every rank."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, brier_score_loss
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryStatScores

from pneumo.config import Config
from pneumo.errors import DataError
from pneumo.evaluation.metrics import Confusion, auroc, rates
from pneumo.evaluation.predictions import sigmoid
from pneumo.evaluation.reliability import fit_logistic
from pneumo.loading.loader import Batch, Loader
from pneumo.network.scoring import Scores, score
from pneumo.training.callbacks import Callbacks, Metrics
from pneumo.training.train_step import Learner


def validate(
    learner: Learner, data: Loader, config: Config, callbacks: Callbacks
) -> Metrics | None:
    """Metrics of the whole val split by the weights, and by their average where there is one, and
    `callbacks.extra_metrics` of the scores of the average, or, where there is none, of the weights.

    None, on every rank, when one of them was asked to stop. Raises DataError unless each study was
    scored once.
    """
    models = {"val/": learner.model}
    if learner.average is not None:
        models["val/ema_"] = learner.average.module
    batch_size = max(config.train.batch_size // learner.world.size, 1)
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


RANKED = ("auroc", "average_precision", "brier", "calibration_slope")
"""What needs both classes."""
AT_HALF = ("accuracy", "precision", "recall", "specificity")


class _StoppableBatches:
    """The same batches, until it should stop."""

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
    """The scores of a split of `count` samples, each once, in the store's order, which the ranks'
    slices follow; None when a rank has stopped."""
    parts: list[Any] = [(mine, stopped)]
    if num_ranks > 1:
        # Also where the ranks agree: one that was not asked goes on to here, and learns of it.
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
    """loss, RANKED and, at p >= 0.5, AT_HALF over all ranks; NaN where undefined: AUROC of one
    class, precision without a positive call, all of logits that are NaN.

    `mine` are this rank's scores, `scores` those of all ranks. torchmetrics adds up loss and counts
    over the ranks of a process group, on `device`. AUROC is `evaluation.metrics`' own, of the ranks
    of all logits: torchmetrics' goes through a sigmoid, which ties large logits, and float32.
    """
    logits, targets = torch.from_numpy(mine.logits).double(), torch.from_numpy(mine.targets)
    losses = F.binary_cross_entropy_with_logits(
        logits,
        targets.double(),
        pos_weight=torch.tensor(pos_weight, dtype=torch.float64),
        reduction="none",
    )
    # In this order: `to` would make it float32 again.
    loss = MeanMetric(nan_strategy="disable").to(device).set_dtype(torch.float64)
    counts = BinaryStatScores(validate_args=False).to(device)
    loss.update(losses.to(device))
    # Calls, as torchmetrics takes a probability of exactly 0.5 for a negative; in one row, as it
    # cannot reshape the empty slice of a rank.
    counts.update((logits >= 0).long()[None].to(device), targets.long()[None].to(device))
    found = {"loss": float(loss.compute())}
    tp, fp, tn, fn, _ = (int(count) for count in counts.compute())
    if not np.isfinite(scores.logits).all():
        return found | dict.fromkeys((*RANKED, *AT_HALF), math.nan)
    at_half = rates(Confusion(tp, fp, fn, tn))
    has_both = 0 < tp + fn < len(scores)
    found |= _rank(scores) if has_both else dict.fromkeys(RANKED, math.nan)
    return found | {name: at_half[name] for name in AT_HALF}


def _rank(scores: Scores) -> dict[str, float]:
    """RANKED of scores of both classes."""
    target, logit = scores.targets.astype(float), scores.logits.astype(float)
    slope, _ = fit_logistic(logit, target, np.ones((len(logit), 1)))
    return {
        "auroc": auroc(scores.targets, scores.logits),
        "average_precision": float(average_precision_score(target, logit)),
        "brier": float(brier_score_loss(target, sigmoid(logit))),
        "calibration_slope": float(slope[0]),
    }
