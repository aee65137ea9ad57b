"""How long training steps take, how long they wait for data, and how busy the GPU is."""

import time
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")

_SLOW_FRACTION, _SLOW_S = 0.05, 1.0
"""Warn when waiting for data exceeds both: a fraction of the time, and seconds."""
_RESET_S = 60.0


class StepTimes:
    """Durations of an epoch's steps, measured on the host.

    On a GPU the host is at most one step ahead, so its steps take as long as the device's.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps_s: list[float] = []
        self.waits_s: list[float] = []

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """Yields the batches; records how long each was waited for, and each whole step."""
        while True:
            started_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits_s.append(time.perf_counter() - started_s)
            yield batch
            self.steps_s.append(time.perf_counter() - started_s)

    def read(self, start: int = 0) -> dict[str, float | None]:
        """images_per_s, data_wait (a fraction of the time), step_p50_s and step_p95_s of the steps
        from index `start` on; None without a step."""
        steps, waits = self.steps_s[start:], self.waits_s[start : len(self.steps_s)]
        seconds = sum(steps)
        return {
            "images_per_s": self.batch_size * len(steps) / seconds if steps else None,
            "data_wait": sum(waits) / seconds if steps else None,
            "step_p50_s": float(np.percentile(steps, 50)) if steps else None,
            "step_p95_s": float(np.percentile(steps, 95)) if steps else None,
        }


class SlowData:
    """Whether training waits for data, measured over several epochs where they are short."""

    def __init__(self) -> None:
        self._skipped = 1
        """Steps at the start that are not counted: before the first, a split is read to memory."""
        self._wait_s = self._total_s = 0.0

    def add(self, times: StepTimes) -> float | None:
        """Add an epoch's steps. Returns the fraction of the time spent waiting where that is above
        5 % and more than a second, else None; both that and a minute of steps reset the sums."""
        waits, steps = times.waits_s[self._skipped :], times.steps_s[self._skipped :]
        self._skipped = 0
        self._wait_s += sum(waits)
        self._total_s += sum(steps)
        fraction = self._wait_s / self._total_s if self._total_s else 0.0
        is_slow = fraction > _SLOW_FRACTION and self._wait_s > _SLOW_S
        if is_slow or self._total_s > _RESET_S:
            self._wait_s = self._total_s = 0.0
        return fraction if is_slow else None


def read_gpu(device: torch.device) -> dict[str, float | None]:
    """gpu_memory_gb, the peak so far, and gpu_utilisation, the current percentage; empty on a CPU.
    To be called once an epoch: the query of the driver may take longer than a step."""
    if device.type != "cuda":
        return {}
    try:
        utilisation: float | None = torch.cuda.utilization(device)
    except Exception:  # NVML's errors have no common class; a MIG slice has no utilisation
        utilisation = None
    return {
        "gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "gpu_utilisation": utilisation,
    }
