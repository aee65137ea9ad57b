"""What a training sample costs, by this loader and by others, and what memory it takes.

    python -m tests.benchmarks.loader [--num-samples 2000] [--image-size 224] [--rounds 3]
        [--memory-samples 20000] [--skip PIPELINE …] [--only PIPELINE …]
    python -m tests.s3.server -- python -m tests.benchmarks.loader …     with rows from S3

Every input pipeline feeds the same pictures (windows of phantoms) as normalised float32 batches of
64, each turned, moved and scaled at random by the same amounts, from files that the page cache
holds. Each runs in a process of its own that lives over all rounds; in a round they take turns in
random order, so that a busy machine slows all of them alike. Cost is CPU time of the pipeline's
whole process tree (DataLoader workers, Ray) during an epoch; one thread for arithmetic each.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import fsspec
import numpy as np
import psutil
import torch

from pneumo import storage
from pneumo.dataset.shards import Sample
from tests.benchmarks.loader_pipelines import (
    BATCH_SIZE,
    PIPELINES,
    Data,
    Epoch,
    LeftOutError,
    feed_ours,
    open_ours,
    write_data,
    write_store,
)
from tests.s3 import server

GOALS = (
    ("memory-later", "npy", 10.0),
    ("memory-later", "npy-workers", 10.0),
    ("memory-later", "png", 15.0),
    ("memory-gray", "npy-gray", 10.0),
    ("memory-gray", "png-gray", 15.0),
    ("memory-first", "npy", 2.0),
    ("memory-first", "png", 2.0),
    ("stream", "npy", 2.0),
    ("stream", "png", 2.0),
    ("memory-s3", "memory-first", 0.8),
    ("stream-s3", "stream", 0.8),
)
"""Samples/s/core of the first, as a multiple of those of the second."""


class Cost(NamedTuple):
    """Of one sample."""

    cpu_s: float
    wall_s: float


def tree_cpu_s() -> float:
    """CPU time of this process and of all that it started, ended or not; to 10 ms for those."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])  # own, and that of its own ended children
    return total


def measure_epoch(feed: Epoch, epoch: int, data: Data) -> Cost:
    gc.collect()
    cpu_s, wall_s = tree_cpu_s(), time.perf_counter()
    count = sum(len(images) for images in feed(epoch))
    cost = Cost((tree_cpu_s() - cpu_s) / count, (time.perf_counter() - wall_s) / count)
    if count != data.batches * BATCH_SIZE:
        raise LeftOutError(f"{count} samples of {data.batches * BATCH_SIZE}")
    return cost


def check_epoch(feed: Epoch, data: Data) -> None:
    """Run one epoch that does not count, as warm-up; check shape, type and mean of its batches."""
    shape, means = (BATCH_SIZE, 1, data.image_size, data.image_size), []
    for images in feed(0):
        if tuple(images.shape) != shape or images.dtype != torch.float32:
            raise LeftOutError(f"gives {images.dtype} {tuple(images.shape)}, not float32 {shape}")
        means.append(float(images[::16].mean()))
    if len(means) != data.batches or abs(statistics.fmean(means)) > 0.6:
        raise LeftOutError(f"gives {len(means)} batches, their mean is {statistics.fmean(means)}")


def limit_threads() -> None:
    """One thread, and no warnings of the libraries."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def serve(name: str, data: Data, parent: Connection) -> None:
    """In a process of its own: measure an epoch for each number from the parent, until None."""
    limit_threads()
    try:
        feed = PIPELINES[name].open(data)
        check_epoch(feed, data)
        parent.send(None)
        while (epoch := parent.recv()) is not None:
            parent.send(measure_epoch(feed, epoch, data))
    except (LeftOutError, ImportError) as error:
        parent.send(error)
    except Exception as error:
        parent.send(LeftOutError(f"{type(error).__name__}: {error}"))


class Memory(NamedTuple):
    """Resident bytes of a process that feeds a first epoch from memory."""

    decoded: int
    after: int
    """Growth from before the loader was opened to after the epoch."""
    peak: int
    """Growth at its greatest meanwhile."""


def serve_memory(data: Data, parent: Connection) -> None:
    """In a process of its own that has imported all and fed nothing: what was freed before and
    could be used again would hide as much of the growth."""
    limit_threads()
    gc.collect()
    before, _ = read_resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    loader = open_ours(data, "memory")
    for _ in feed_ours(loader, 0):
        pass
    gc.collect()
    after, peak = read_resident()
    parent.send(Memory(len(loader) * data.image_size**2, after - before, peak - before))


def read_resident() -> tuple[int, int]:
    """Resident bytes of this process, and their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def measure_memory(num_samples: int, image_size: int) -> Memory:
    """Of as many samples of noise."""
    rng = np.random.default_rng(0)
    shape = (image_size, image_size)
    samples = (
        Sample(f"study{i:06d}", rng.integers(0, 256, shape, dtype=np.uint8), 0)
        for i in range(num_samples)
    )
    with tempfile.TemporaryDirectory(prefix="pneumo-bench-") as scratch:
        write_store(Path(scratch) / "store", samples)
        runner = Runner(serve_memory, Data(Path(scratch), num_samples, image_size, 0.5, 0.29))
        try:
            memory: Memory = runner.ask()
        finally:
            runner.stop()
    return memory


class Runner:
    """The process of one pipeline; of one that fails the parent gets the reason."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def ask(self, question: int | None = None) -> Any:
        """The next answer, after `question` where there is one. Raises LeftOutError."""
        try:
            if question is not None:
                self.link.send(question)
            answer = self.link.recv()
        except (EOFError, OSError) as error:
            raise LeftOutError("its process has ended") from error
        if isinstance(answer, Exception):
            raise LeftOutError(str(answer))
        return answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.link.send(None)
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def measure(
    names: Sequence[str], data: Data, rounds: int
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """Costs of each pipeline by round; and the pipelines that are left out, with their reasons."""
    costs: dict[str, list[Cost]] = {}
    left_out: dict[str, str] = {}
    runners: dict[str, Runner] = {}
    try:
        for name in names:  # one after the other: each has the machine while it warms up
            runner = runners[name] = Runner(serve, name, data)
            try:
                runner.ask()
                costs[name] = []
            except LeftOutError as error:
                left_out[name] = str(error)
        rng = random.Random(0)
        for epoch in range(1, rounds + 1):
            for name in rng.sample(sorted(costs), len(costs)):
                try:
                    costs[name].append(runners[name].ask(epoch))
                except LeftOutError as error:
                    left_out[name] = str(error)
                    del costs[name]
    finally:
        for runner in runners.values():
            runner.stop()
    return {name: costs[name] for name in names if name in costs}, left_out


# --- the report


def median_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.cpu_s for cost in costs),
        statistics.median(cost.wall_s for cost in costs),
    )


def tabulate(costs: dict[str, list[Cost]]) -> list[str]:
    """One row a pipeline, its rate as a multiple of the original project's and of PNG shards."""
    medians = {name: median_cost(found) for name, found in costs.items()}
    columns = {"us CPU": 8, "/s/core": 9, "x .npy": 8, "x PNG": 7, "us wall": 9, "/s": 8}
    rows = [f"{'pipeline':<36}" + "".join(f"{name:>{size}}" for name, size in columns.items())]
    for name, cost in medians.items():
        ratios = [
            f"{medians[other].cpu_s / cost.cpu_s:.2f}" if other in medians else "-"
            for other in ("npy", "png")
        ]
        rows.append(
            f"{PIPELINES[name].label:<36}{cost.cpu_s * 1e6:>8.0f}{1 / cost.cpu_s:>9.0f}"
            f"{ratios[0]:>8}{ratios[1]:>7}{cost.wall_s * 1e6:>9.0f}{1 / cost.wall_s:>8.0f}"
        )
    return rows


def compare_with_goals(costs: dict[str, list[Cost]]) -> list[str]:
    """Each goal, and by how much it is met: the median over rounds of CPU ratios, and their
    range; for S3 those of wall time too."""
    rows = []
    for name, other, goal in GOALS:
        if name not in costs or other not in costs:
            continue
        pairs = list(zip(costs[other], costs[name], strict=False))
        ratios = [theirs.cpu_s / ours.cpu_s for theirs, ours in pairs]
        row = f"{PIPELINES[name].label} / {PIPELINES[other].label}"
        row = f"{row:<72}{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if name.endswith("-s3"):
            wall = statistics.median(theirs.wall_s / ours.wall_s for theirs, ours in pairs)
            row += f", by wall time {wall:.2f}"
        rows.append(f"{row}  goal {goal:g}")
    return rows


def describe_memory(memory: Memory) -> str:
    after, peak = memory.after / memory.decoded, memory.peak / memory.decoded
    return (
        f"memory: {memory.decoded / 1e6:.0f} MB decoded; resident growth {memory.after / 1e6:.0f} "
        f"MB after the first epoch ({after:.2f}), {memory.peak / 1e6:.0f} at most ({peak:.2f})"
    )


@contextlib.contextmanager
def open_bucket() -> Iterator[str | None]:
    """A bucket on the S3 server that the environment names, removed in the end; None without."""
    endpoint = os.environ.get(server.ENDPOINT)
    if not endpoint:
        yield None
        return
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = f"pneumo-bench-{uuid.uuid4().hex[:12]}"
    fs.mkdir(bucket)
    try:
        yield f"s3://{bucket}/store"
    finally:
        storage.remove_below(f"s3://{bucket}/store")
        fs.rmdir(bucket)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.loader", epilog=f"PIPELINE: {', '.join(PIPELINES)}, memory"
    )
    choices = [*PIPELINES, "memory"]
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--memory-samples", type=int, default=20_000, help="of the memory's line")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    for flag in ("--skip", "--only"):
        parser.add_argument(flag, nargs="+", choices=choices, metavar="PIPELINE", default=[])
    options = parser.parse_args(arguments)
    chosen = [n for n in options.only or choices if n not in options.skip]
    # Before torch and Ray start their threads in the processes to come.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    limit_threads()
    if "memory" in chosen:
        chosen.remove("memory")
        print(describe_memory(measure_memory(options.memory_samples, options.image_size)))
    with tempfile.TemporaryDirectory(prefix="pneumo-bench-") as scratch, open_bucket() as s3_url:
        data = write_data(
            Path(scratch),
            options.num_samples,
            options.image_size,
            formats={PIPELINES[name].format for name in chosen},
            s3_url=s3_url,
        )
        costs, left_out = measure(chosen, data, options.rounds)
    if costs:
        print(
            f"\n{data.num_samples} samples, {data.image_size} px, batches of {BATCH_SIZE}, "
            f"medians of {options.rounds} rounds; a sample's cost, CPU time of the process tree"
        )
        print("\n".join([*tabulate(costs), "", *compare_with_goals(costs)]))
    for name, reason in left_out.items():
        print(f"left out: {PIPELINES[name].label}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
