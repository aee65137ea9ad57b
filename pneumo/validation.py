"""How good a model is on the val split after an epoch, the same on every rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pneumo import metrics
from pneumo.config import Config
from pneumo.errors import DataError
from pneumo.learner import Learner
from pneumo.loader import Loader
from pneumo.partition import World
from pneumo.predict import score


def validate(
    learner: Learner, data: Loader, config: Config, world: World
) -> dict[str, float | None]:
    """Metrics of the whole val split by the weights, and by their average where there is one."""
    pos_weight = float(learner.pos_weight)
    found = _judge(learner.model, data, config, world, pos_weight, "val/")
    if learner.average is not None:
        found |= _judge(learner.average.model, data, config, world, pos_weight, "val/ema_")
    return found


def _judge(
    model: nn.Module,
    data: Loader,
    config: Config,
    world: World,
    pos_weight: float,
    prefix: str,
) -> dict[str, float | None]:
    """Metrics of the whole split, the same on every rank, each sample counted once."""
    batch_size = max(config.train.batch_size // world.size, 1)
    scores: Any = score(model, data.evaluation(batch_size=batch_size))
    parts = [scores]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, scores)
    # The ranks' shares follow one another in the store's order.
    logits = np.concatenate([part.logits for part in parts]).astype(np.float64)
    target = np.concatenate([part.targets for part in parts])
    studies = len({key for part in parts for key in part.keys})
    if len(logits) != len(data) or studies != len(data):
        raise DataError(
            f"val: {len(logits)} scores of {studies} studies, expected {len(data)} once"
        )
    loss = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logits),
        torch.from_numpy(target).double(),
        pos_weight=torch.tensor(pos_weight, dtype=torch.float64),
    )
    values = {"loss": float(loss), **metrics.binary_metrics_from_logits(target, logits)}
    return {f"{prefix}{name}": v if math.isfinite(v) else None for name, v in values.items()}
