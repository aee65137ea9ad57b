"""How good a model is on the val split after an epoch, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pneumo.config import Config
from pneumo.errors import DataError
from pneumo.evaluation import metrics
from pneumo.loading.loader import Batch, Loader
from pneumo.loading.sample_order import World
from pneumo.network.scoring import Scores, score
from pneumo.training.train_step import Learner


def validate(
    learner: Learner,
    data: Loader,
    config: Config,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
    judge: Callable[[Scores], Mapping[str, float | None]] = lambda scores: {},
) -> dict[str, float | None] | None:
    """Metrics of the whole val split by the weights, and by their average where there is one, and
    what `judge` finds in the scores of the average, or, where there is none, of the weights.

    None, on every rank, when one of them was asked to stop; `should_stop` is asked after each
    batch. Raises DataError.
    """
    models = {"val/": learner.model}
    if learner.average is not None:
        models["val/ema_"] = learner.average.model
    batch_size = max(config.train.batch_size // world.size, 1)
    found: dict[str, float | None] = {}
    for prefix, model in models.items():
        batches = _Batches(data.evaluation(batch_size=batch_size), should_stop)
        share: Any = (score(model, batches), batches.stopped)
        parts = [share]
        if world.size > 1:
            # Also where the ranks agree: one that was not asked goes on to here, and learns of it.
            parts = [None] * world.size
            dist.all_gather_object(parts, share)
        if any(stopped for _, stopped in parts):
            return None
        scores = _join([scored for scored, _ in parts], len(data))
        values = _describe(scores, float(learner.pos_weight))
        found |= {f"{prefix}{name}": v if math.isfinite(v) else None for name, v in values.items()}
    return {**found, **judge(scores)}


class _Batches:
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


def _join(parts: Sequence[Scores], count: int) -> Scores:
    """The scores of a split of `count` samples, each once.

    `parts` are the ranks' shares, which follow one another in the store's order.
    """
    found = Scores(
        tuple(key for part in parts for key in part.keys),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )
    studies = len(set(found.keys))
    if len(found.keys) != count or studies != count:
        raise DataError(
            f"val: {len(found.keys)} scores of {studies} studies, expected {count} once"
        )
    return found


def _describe(scores: Scores, pos_weight: float) -> dict[str, float]:
    logits = scores.logits.astype(np.float64)
    loss = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logits),
        torch.from_numpy(scores.targets).double(),
        pos_weight=torch.tensor(pos_weight, dtype=torch.float64),
    )
    return {"loss": float(loss), **metrics.binary_metrics_from_logits(scores.targets, logits)}
