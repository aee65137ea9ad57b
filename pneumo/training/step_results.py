"""What came of each step, read without holding up a GPU: losses, requests to stop, gradients'
lengths."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Unread:
    """A step whose outcome is still on its way to the host."""

    step: int
    keys: tuple[str, ...]
    """This rank's part of the batch."""
    values: Tensor
    """(3,) on the host: mean loss, how many ranks want to stop, and the length of the gradient, NaN
    where it was not taken."""
    arrived: torch.cuda.Event | None


@dataclass(frozen=True)
class Divergence:
    """A step whose loss is no number."""

    step: int
    keys: tuple[str, ...]
    loss: float


class Outcomes:
    """Outcomes of the steps of an epoch, the same on every rank.

    On a GPU a step's are read after the next one has been queued: the host waits for nothing that
    is not done, and every rank still learns of a request at the same step.
    """

    def __init__(
        self, device: torch.device, *, loss_sum: float = 0.0, grad_norm: float | None = None
    ) -> None:
        self._lag = 1 if device.type == "cuda" else 0
        self._no_norm = torch.full((1,), math.nan, device=device)
        self._unread: deque[Unread] = deque()
        self.losses: list[float] = []
        """Of the steps that have been read."""
        self.loss_sum = loss_sum
        """Of all steps of the epoch that have been read, those before a resumption included."""
        self.grad_norm = grad_norm
        """The latest that has been read."""
        self.should_stop = False
        self.divergence: Divergence | None = None
        """The first one."""

    def put(
        self, step: int, keys: tuple[str, ...], outcome: Tensor, norm: Tensor | None = None
    ) -> None:
        """Take what `Learner.learn` gave, (2,) and (), and read what has come."""
        values = torch.cat([outcome, self._no_norm if norm is None else norm.reshape(1)])
        arrived = None
        if self._lag:
            host = torch.empty(3, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            values = host
        self._unread.append(Unread(step, keys, values, arrived))
        self._read(leave=self._lag)

    def drain(self) -> None:
        """Read all."""
        self._read(leave=0)

    def _read(self, leave: int) -> None:
        while len(self._unread) > leave:
            unread = self._unread.popleft()
            if unread.arrived is not None:
                unread.arrived.synchronize()
            loss, stops, norm = unread.values.tolist()
            if math.isfinite(norm):
                self.grad_norm = norm
            self.losses.append(loss)
            self.loss_sum += loss
            self.should_stop |= stops > 0
            if not math.isfinite(loss) and self.divergence is None:
                self.divergence = Divergence(unread.step, unread.keys, loss)
