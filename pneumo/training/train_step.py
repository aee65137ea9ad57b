"""One training step: micro-batches, gradients, running statistics, weights and their average.

A step's batch is split into micro-batches of fixed size, and each rank takes whole ones. The
gradient is that of the mean loss over all micro-batches, and BatchNorm uses the statistics of each
micro-batch alone: a step gives the same on any number of ranks, up to the rounding of sums.
"""

import hashlib
import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import StochasticDepth

from pneumo.config import TrainConfig
from pneumo.loading.loader import Batch
from pneumo.loading.sample_order import World, micro_batches
from pneumo.training.batch_norm import RunningStatistics
from pneumo.training.optimisation import (
    autocast_dtype,
    average_weights,
    build_optimizer,
)

_RANDOM_LAYERS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout, StochasticDepth),
)


class Learner:
    """A model with its optimiser. All ranks must call `learn` with the same arguments but `batch`.

    `model` is trained in place, on `device`, in channels_last; it starts from rank 0's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        pos_weight: float,
        seed: int,
        world: World,
        device: torch.device,
    ) -> None:
        model.to(device)
        model.to(memory_format=torch.channels_last)
        self.model, self.config, self.world, self.device = model, config, world, device
        self.seed, self.pos_weight = seed, torch.tensor(pos_weight, device=device)
        self.dtype = autocast_dtype(config, device)
        self.optimizer = build_optimizer(model.parameters(), config)
        if config.compile:
            model.compile()
        self.network = _distribute(model, world)
        self.average = average_weights(model, config.ema_decay) if config.ema_decay else None
        self.statistics = RunningStatistics(model)
        self.micro_batches = micro_batches(config.batch_size, config.micro_batch_size, world)
        """Indices of this rank's micro-batches within a step."""
        self.micro_batches_per_step = config.batch_size // config.micro_batch_size
        self.has_random_layers = any(
            isinstance(module, _RANDOM_LAYERS) and module.p > 0 for module in model.modules()
        )

    def learn(
        self,
        batch: Batch,
        *,
        epoch: int,
        step: int,
        lr: float,
        stop: bool = False,
        with_norm: bool = False,
    ) -> Tensor:
        """One step on this rank's part of a batch; `epoch` and `step` count from 0.

        Returns (4,) on the device: the mean loss over all ranks, the number of ranks with `stop`,
        the number of samples on all ranks, and the gradient norm before clipping. The norm is NaN
        without `with_norm` and without clipping.
        """
        losses, count = self._accumulate(batch, epoch, step), len(batch.keys)
        mine = [losses, *(torch.full((), float(n), device=self.device) for n in (stop, count))]
        totals = torch.cat([self.statistics.sums, torch.stack(mine)])
        if self.world.size > 1:
            dist.all_reduce(totals)
        totals[:-2] /= self.micro_batches_per_step
        norm = self._gradient_norm(with_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.statistics.update(totals[:-3])
        if self.average is not None:
            self.average.update_parameters(self.model)
        return torch.cat([totals[-3:], norm.reshape(1)])

    def _gradient_norm(self, wanted: bool) -> Tensor:
        """Clip the gradient where the settings say so; returns its L2 norm over all weights before
        that, or NaN."""
        if self.config.clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if wanted:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return torch.full((), math.nan, device=self.device)

    def _accumulate(self, batch: Batch, epoch: int, step: int) -> Tensor:
        """Compute the gradients of the step's mean loss; returns the sum of this rank's losses."""
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.micro_batch_size
        total = torch.zeros((), device=self.device)
        for number, images, targets in zip(
            self.micro_batches,
            torch.split(batch.images, size),
            torch.split(batch.targets, size),
            strict=True,
        ):
            if self.has_random_layers:
                torch.manual_seed(_derive_seed(self.seed, epoch, step, number))
            is_last = number == self.micro_batches[-1]
            # DDP all-reduces once per step, in the backward pass of the last micro-batch.
            with nullcontext() if is_last else self._without_sync():
                with torch.autocast(
                    self.device.type, self.dtype, enabled=self.dtype != torch.float32
                ):
                    logits = self.network(images).squeeze(1)
                loss = F.binary_cross_entropy_with_logits(
                    logits.float(), targets, pos_weight=self.pos_weight
                )
                # DDP divides the sum over ranks by their number.
                weight = self.world.size / self.micro_batches_per_step
                (loss * weight).backward()  # type: ignore[no-untyped-call]
            self.statistics.add()
            total += loss.detach()
        return total

    def _without_sync(self) -> AbstractContextManager[None]:
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()


def _distribute(model: nn.Module, world: World) -> nn.Module:
    if world.size == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,  # `learn` all-reduces running statistics once per step
    )


def _derive_seed(seed: int, epoch: int, step: int, micro_batch: int) -> int:
    """The seed of the random layers for one micro-batch."""
    name = f"pneumo/layers/{seed}/{epoch}/{step}/{micro_batch}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
