"""BatchNorm's running statistics, the same for any number of ranks.

A micro-batch is normalised by its own statistics, on whichever rank it is. The running ones, which
evaluation uses, move once a step towards the mean over all the step's micro-batches:

    running = (1 - momentum) * running + momentum * mean over micro-batches and ranks

which is the rule of torch.nn.BatchNorm2d where a step is one micro-batch.
"""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running statistics of all BatchNorm layers of a model, instead of the layers' own.

    From construction on, a forward pass in training mode leaves the statistics of that micro-batch
    alone in a layer's buffers, until `update` puts the running ones there.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        self.buffers: list[Tensor] = []
        momenta: list[float] = []
        for layer in layers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.momentum is not None
            self.buffers += [layer.running_mean, layer.running_var]
            momenta += [layer.momentum] * 2
            layer.momentum = 1.0
        self.counts = [
            layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None
        ]
        self.sizes = [len(buffer) for buffer in self.buffers]
        device = next(model.parameters()).device
        repeats = torch.tensor(self.sizes, dtype=torch.long)
        self.momentum = torch.tensor(momenta).repeat_interleave(repeats).to(device)
        """(D,): of each running number."""
        self.running = self._flatten()
        self.sums = torch.zeros_like(self.running)
        """(D,): of this rank's micro-batches in the step so far."""
        self.num_added = 0

    def __len__(self) -> int:
        """D: how many running numbers there are."""
        return len(self.running)

    def add(self) -> None:
        """Count the micro-batch that has just gone through the network."""
        if self.buffers:
            self.sums += self._flatten()
        self.num_added += 1

    def update(self, mean: Tensor) -> None:
        """Take the mean (D,) over the step's micro-batches on all ranks into the buffers."""
        if self.buffers:
            self.running = self.running + self.momentum * (mean - self.running)
            torch._foreach_copy_(self.buffers, list(torch.split(self.running, self.sizes)))
            torch._foreach_sub_(self.counts, self.num_added - 1)  # a step counts as one
        self.sums.zero_()
        self.num_added = 0

    def _flatten(self) -> Tensor:
        if not self.buffers:
            return torch.zeros(0, device=self.momentum.device)
        return torch.cat(self.buffers)
