"""What writing a checkpoint costs the steps that train meanwhile, on the host.

    python -m tests.benchmarks.checkpoint [--rounds 5] [--work-ms 5] [--step-ms 20]

A checkpoint of ResNet-18 with Adam's moments is made into bytes in a thread, as while training. The
main thread takes steps as with a GPU: some work in Python that releases the GIL now and then, as
launching kernels does, and then waiting for the device. Where the work takes longer than a step,
the GPU has nothing to do.

    nothing   no checkpoint is written
    BytesIO   torch.save into an io.BytesIO
    pneumo    pneumo.training.checkpoint_content.to_bytes
"""

import argparse
import io
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pneumo.network.backbones import build_model
from pneumo.training.checkpoint_content import to_bytes

SLICE_S = 0.0002
"""Seconds of work before Python's lock is released."""


def make_state() -> dict[str, Any]:
    """As much as a checkpoint holds: 134 MB."""
    model = build_model("resnet18")
    moments = [{name: torch.zeros_like(p) for name in ("m", "v")} for p in model.parameters()]
    return {"model": model.state_dict(), "optimizer": moments}


def into_bytesio(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def work(seconds: float) -> float:
    """Use so many seconds of this thread's CPU, in slices; the wall time it took, in seconds."""
    begun_s = time.perf_counter()
    for _ in range(round(seconds / SLICE_S)):
        end_s = time.thread_time() + SLICE_S
        while time.thread_time() < end_s:
            pass
        time.sleep(0)
    return time.perf_counter() - begun_s


def take_steps(write: Callable[[], object], work_s: float, step_s: float) -> tuple[float, float]:
    """Take steps while `write` runs in a thread; mean seconds of work in a step, and the seconds
    that `write` took."""
    work_times_s, begun_s = [], time.perf_counter()
    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        work_times_s.append(work(work_s))
        time.sleep(max(step_s - work_times_s[-1], 0))
    thread.join()
    return statistics.fmean(work_times_s), time.perf_counter() - begun_s


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-ms", type=float, default=5.0, help="of a step on the host")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of a step on the device")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    state = make_state()
    writers: dict[str, Callable[[], object]] = {
        "nothing": lambda: time.sleep(0.2),
        "BytesIO": lambda: into_bytesio(state),
        "pneumo": lambda: to_bytes(state),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in writers}
    for _ in range(options.rounds):
        for name, write in writers.items():
            found[name].append(take_steps(write, options.work_ms / 1e3, options.step_ms / 1e3))
    print(f"{'writer':<10}{'work of a step, ms':>20}{'ratio':>8}{'to write, ms':>14}")
    alone_s = statistics.median(work_s for work_s, _ in found["nothing"])
    for name, pairs in found.items():
        work_s, whole_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<10}{work_s * 1e3:>20.1f}{work_s / alone_s:>8.2f}{whole_s * 1e3:>14.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
