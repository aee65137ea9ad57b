"""What writing a checkpoint costs the steps that train meanwhile, on the host.

    python -m tests.benchmarks.checkpoint [--rounds 5] [--work-ms 5] [--step-ms 20]

A checkpoint of ResNet-18 with Adam's moments is made into bytes in a thread, as while training. The
main thread takes steps as of a GPU: some work in Python that lets go of its lock now and then, as
the launching of kernels does, and then waiting for the device. Where the work takes longer than a
step, the GPU runs dry.

    nothing   no checkpoint is written
    BytesIO   torch.save into an object of Python's
    pneumo    pneumo.training.checkpoints.to_bytes
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
from pneumo.training.checkpoints import to_bytes

BIT_S = 0.0002
"""Of work before the lock is let go."""


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
    """So much CPU time of this thread, in bits; the time it took, in seconds."""
    begun_s = time.perf_counter()
    for _ in range(round(seconds / BIT_S)):
        end_s = time.thread_time() + BIT_S
        while time.thread_time() < end_s:
            pass
        time.sleep(0)
    return time.perf_counter() - begun_s


def take_steps(beside: Callable[[], object], work_s: float, step_s: float) -> tuple[float, float]:
    """Steps for as long as `beside` runs in its thread: mean seconds of work in a step, and how
    long `beside` took."""
    took_s, begun_s = [], time.perf_counter()
    thread = threading.Thread(target=beside)
    thread.start()
    while thread.is_alive():
        took_s.append(work(work_s))
        time.sleep(max(step_s - took_s[-1], 0))
    thread.join()
    return statistics.fmean(took_s), time.perf_counter() - begun_s


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work-ms", type=float, default=5.0, help="of a step on the host")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of a step on the device")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    state = make_state()
    ways: dict[str, Callable[[], object]] = {
        "nothing": lambda: time.sleep(0.2),
        "BytesIO": lambda: into_bytesio(state),
        "pneumo": lambda: to_bytes(state),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, beside in ways.items():
            found[name].append(take_steps(beside, options.work_ms / 1e3, options.step_ms / 1e3))
    print(f"{'beside':<10}{'work of a step, ms':>20}{'ratio':>8}{'it took, ms':>14}")
    alone_s = statistics.median(work_s for work_s, _ in found["nothing"])
    for name, pairs in found.items():
        work_s, whole_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<10}{work_s * 1e3:>20.1f}{work_s / alone_s:>8.2f}{whole_s * 1e3:>14.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
