"""Results of steps, read without blocking a GPU: losses, requests to stop, gradient norms."""

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_VALUES = 4


@dataclass
class EpochTotals:
    """Totals over the steps of an epoch, including those before the run was resumed."""

    step: int = 0
    """Completed steps."""
    loss: float = 0.0
    """Sum of the steps' losses."""
    samples: int = 0
    """Samples on all ranks."""
    grad_norm: float | None = None
    """The last one that was computed."""


@dataclass(frozen=True)
class Divergence:
    """A step whose loss is not finite."""

    step: int
    keys: tuple[str, ...]
    """This rank's part of the batch."""
    loss: float


@dataclass(frozen=True, eq=False)
class _Unread:
    """A step whose results are still being copied to the host."""

    step: int
    keys: tuple[str, ...]
    values: Tensor
    """(4,) on the host."""
    arrived: torch.cuda.Event | None


class StepResults:
    """Results of an epoch's steps, the same on every rank, added to `totals`.

    On a GPU the results of a step are read after the next step has been queued: the device never
    waits for the host, and all ranks still see a request to stop at the same step.
    """

    def __init__(self, device: torch.device, totals: EpochTotals) -> None:
        self.totals = totals
        self.losses: list[float] = []
        """Of the steps read so far."""
        self.should_stop = False
        self.divergence: Divergence | None = None
        """The first one."""
        self._lag = 1 if device.type == "cuda" else 0
        self._unread: deque[_Unread] = deque()

    def put(self, step: int, keys: tuple[str, ...], values: Tensor) -> None:
        """Add what `Learner.learn` returned, (4,), and read all steps but the last `_lag`."""
        arrived = None
        if self._lag:
            host = torch.empty(NUM_VALUES, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            values = host
        self._unread.append(_Unread(step, keys, values, arrived))
        self._read(num_left=self._lag)
        self.totals.step = step + 1

    def read_all(self) -> None:
        """Read all results; waits for those that are still being copied."""
        self._read(num_left=0)

    def _read(self, num_left: int) -> None:
        while len(self._unread) > num_left:
            unread = self._unread.popleft()
            if unread.arrived is not None:
                unread.arrived.synchronize()
            loss, stops, samples, norm = unread.values.tolist()
            self.losses.append(loss)
            self.totals.loss += loss
            self.totals.samples += int(samples)
            if math.isfinite(norm):
                self.totals.grad_norm = norm
            self.should_stop |= stops > 0
            if not math.isfinite(loss) and self.divergence is None:
                self.divergence = Divergence(unread.step, unread.keys, loss)
