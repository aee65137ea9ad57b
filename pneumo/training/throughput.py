"""Where the time of training goes: steps, waiting for data, and what the GPU does meanwhile."""

import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

_SLOW_FRACTION, _SLOW_S = 0.05, 1.0
"""Training warns when it waits for data longer than both: a fraction of the time, and seconds."""
_FORGET_S = 60.0


class StepTimes:
    """Times of the steps since the last `read`, as the host sees them.

    On a GPU the host runs one step ahead at most, so its steps take as long as the device's.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps_s: list[float] = []
        self.waits_s: list[float] = []
        self._begun_s = time.perf_counter()

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; how long each was waited for, and took until the next, is kept."""
        while True:
            self._begun_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits_s.append(time.perf_counter() - self._begun_s)
            yield batch
            self.steps_s.append(time.perf_counter() - self._begun_s)

    def read(self, start: int = 0) -> dict[str, float | None]:
        """images_per_s, data_wait (a fraction of the time), step_p50_s and step_p95_s of the steps
        from number `start` on; None where unknown."""
        steps, waits = self.steps_s[start:], self.waits_s[start : len(self.steps_s)]
        seconds = sum(steps)
        return {
            "images_per_s": self.batch_size * len(steps) / seconds if steps else None,
            "data_wait": sum(waits) / seconds if steps else None,
            "step_p50_s": float(np.percentile(steps, 50)) if steps else None,
            "step_p95_s": float(np.percentile(steps, 95)) if steps else None,
        }


class SlowData:
    """Whether training waits for data, over epochs that may be short or the only one."""

    def __init__(self) -> None:
        self._skipped = 1
        """Steps at the start that do not count: before the first the split may be read."""
        self._wait_s = self._total_s = 0.0

    def add(self, times: StepTimes) -> float | None:
        """Add an epoch's steps; the fraction of the time that was waited, once it is above 5 % and
        more than a second, else None. The sums begin anew after that, and after a minute."""
        waits, steps = times.waits_s[self._skipped :], times.steps_s[self._skipped :]
        self._skipped = 0
        self._wait_s += sum(waits)
        self._total_s += sum(steps)
        fraction = self._wait_s / self._total_s if self._total_s else 0.0
        is_slow = fraction > _SLOW_FRACTION and self._wait_s > _SLOW_S
        if is_slow or self._total_s > _FORGET_S:
            self._wait_s = self._total_s = 0.0
        return fraction if is_slow else None


def read_gpu(device: torch.device) -> dict[str, float | None]:
    """gpu_memory_gb, the most so far, and gpu_utilisation, in percent of the last moments; nothing
    on a CPU. It asks the driver, which may take longer than a step: once an epoch."""
    if device.type != "cuda":
        return {}
    try:
        utilisation: float | None = torch.cuda.utilization(device)
    except Exception:  # NVML's errors have no common class; for a part of a GPU it has no number
        utilisation = None
    return {
        "gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "gpu_utilisation": utilisation,
    }
