"""BatchNorm's running statistics, the same for any number of ranks.

In training each micro-batch is normalised by its own statistics, on whichever rank it is. The
running statistics, which evaluation uses, are updated once per step:

    running = (1 - momentum) * running + momentum * mean over micro-batches and ranks

With one micro-batch per step this is the rule of torch.nn.BatchNorm2d.
"""

import torch
from torch import Tensor, nn


class RunningStatistics:
    """The running statistics of all BatchNorm layers of a model.

    Construction sets the layers' momentum to 1, until `restore_momenta`: a forward pass in training
    mode then leaves the statistics of that micro-batch alone in the layers' buffers, until `update`
    writes the running statistics to them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            module
            for module in model.modules()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
            and module.track_running_stats
        ]
        self.buffers: list[Tensor] = []
        self.momenta: list[float] = []
        """Of each layer."""
        for layer in self.layers:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.momentum is not None
            self.buffers += [layer.running_mean, layer.running_var]
            self.momenta.append(layer.momentum)
            layer.momentum = 1.0
        self.counts = [
            layer.num_batches_tracked
            for layer in self.layers
            if layer.num_batches_tracked is not None
        ]
        self.sizes = [len(buffer) for buffer in self.buffers]
        device = next(model.parameters()).device
        repeats = torch.tensor(self.sizes, dtype=torch.long)
        of_buffers = torch.tensor(self.momenta).repeat_interleave(2)
        self.momentum = of_buffers.repeat_interleave(repeats).to(device)
        """(D,): the momentum of each value."""
        self.running = self._flatten()
        self.sums = torch.zeros_like(self.running)
        """(D,): the sums over this rank's micro-batches in the current step."""
        self.num_added = 0

    def __len__(self) -> int:
        """D, the number of values."""
        return len(self.running)

    def add(self) -> None:
        """Add the statistics of the micro-batch that was just passed through the network."""
        if self.buffers:
            self.sums += self._flatten()
        self.num_added += 1

    def update(self, mean: Tensor) -> None:
        """Update the buffers with the mean (D,) over the step's micro-batches on all ranks."""
        if self.buffers:
            self.running = self.running + self.momentum * (mean - self.running)
            torch._foreach_copy_(self.buffers, list(torch.split(self.running, self.sizes)))
            torch._foreach_sub_(self.counts, self.num_added - 1)  # a step counts as one batch
        self.sums.zero_()
        self.num_added = 0

    def restore_momenta(self) -> None:
        """Give the layers their momentum back, at the end of a training."""
        for layer, momentum in zip(self.layers, self.momenta, strict=True):
            layer.momentum = momentum

    def _flatten(self) -> Tensor:
        if not self.buffers:
            return torch.zeros(0, device=self.momentum.device)
        return torch.cat(self.buffers)
