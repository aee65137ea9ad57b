"""An exponential moving average of a model's weights, which often scores better than the last ones.

Averaged are the weights and BatchNorm's running statistics. In the first steps the decay is
(1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage, so that the random beginning is
soon forgotten.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average, as a model of its own in evaluation mode."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._mine, self._theirs = _floats(self.model), _floats(model)

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Take the weights after step `num_steps` of the run, counted from 1, into the average."""
        decay = min(self.decay, (1 + num_steps) / (10 + num_steps))
        torch._foreach_lerp_(self._mine, self._theirs, 1 - decay)


def _floats(model: nn.Module) -> list[Tensor]:
    """Weights and running statistics; counts are left out."""
    every = [*model.parameters(), *model.buffers()]
    return [tensor.detach() for tensor in every if tensor.is_floating_point()]
