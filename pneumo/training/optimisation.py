"""Optimiser, learning rate schedule and weight average."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pneumo.config import TrainConfig

SGD_MOMENTUM = 0.9


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimiser that `train.optimizer` names, in its fused implementation."""
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=SGD_MOMENTUM, weight_decay=decay, fused=True
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=decay, fused=True)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate at `step` of the run, from 0: linear warm-up, then constant or cosine
    decay. It has no state that a checkpoint would need."""
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward; weights, optimiser and scoring stay float32."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


Tensors = tuple[Tensor, ...] | list[Tensor]


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights and of BatchNorm's running statistics.

    Call `update_parameters` once per step; `module` is the averaged model, in evaluation mode, and
    `n_averaged` the number of the next step, from 1. In the first steps the decay is
    (1 + n) / (10 + n), as in TensorFlow, so that the random first weights soon count little.
    """

    def update(averaged: Tensors, current: Tensors, _: Tensor | int) -> None:
        if averaged[0].is_floating_point():  # not BatchNorm's num_batches_tracked
            step = int(average.n_averaged)  # on the host: reading a device tensor would block
            step_decay = min(decay, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(step_decay)(averaged, current, step)  # type: ignore[no-untyped-call]

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.eval().requires_grad_(False)
    average.n_averaged.fill_(1)  # at 0 the first update would copy the weights
    return average
