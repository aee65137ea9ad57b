"""An exponential moving average of a model's weights, which often scores better than the last ones.

Averaged are the weights and BatchNorm's running statistics. In the first steps the decay is
(1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that the random beginning is
soon forgotten.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """The average, which each `update_parameters` takes further by one step; its `module` is the
    averaged model, in evaluation mode, its `n_averaged` the number of the next step, from 1."""

    def update(averaged: list[Tensor], current: list[Tensor], _: object) -> None:
        if averaged[0].is_floating_point():  # BatchNorm's counts of batches are left out
            step = int(average.n_averaged)  # the host's: for the device's copy it would wait
            get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averaged, current, step)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.eval().requires_grad_(False)
    average.n_averaged.fill_(1)  # at 0 the first update would copy the weights
    return average
