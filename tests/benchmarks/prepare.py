"""What jobs.prepare costs beside bare decoding, and what memory it takes for sources of any size.

    python -m tests.benchmarks.prepare rate [--num-studies 26684] [--image-size 224] [--rounds 3]
    python -m tests.benchmarks.prepare memory [--sizes 1000 10000 100000]
    python -m tests.benchmarks.prepare index

Ratios are taken in one run; wall times are of this machine and of what else it does.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from jobs import prepare
from jobs.ray_cluster.session import ray_session
from pneumo.config import Config
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import split_studies
from pneumo.images.dicom import read_study_image
from tests.benchmarks.sources import find_real_data, list_images, write_linked_source
from tests.conftest import encode_dicom

HEADERS_ONLY = 32  # pixels of an image's side: enough to be one


@dataclass(frozen=True)
class Cost:
    """What some studies cost; CPU time is that of all processes together."""

    wall_s: float
    cpu_s: float
    others_s: float
    """CPU time of all other processes; where it is not small the rates are not reliable."""


class Stopwatch:
    """Wall and CPU time of a stretch of work."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s, self.busy_s = time.perf_counter(), cpu_of_tree(), busy_cpu()

    def stop(self) -> Cost:
        """What it cost since."""
        cpu_s = cpu_of_tree() - self.cpu_s
        wall_s = time.perf_counter() - self.wall_s
        return Cost(wall_s, cpu_s, max(0.0, busy_cpu() - self.busy_s - cpu_s))


def cpu_of_tree() -> float:
    """CPU seconds of this process and of all that it has started."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def busy_cpu() -> float:
    """CPU seconds in which the machine's cores were not idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def decode_all(paths: list[Path], image_size: int) -> None:
    """Read and decode these files, and nothing else."""
    for path in paths:
        read_study_image(path.read_bytes(), image_size)


def decode_in_pool(paths: list[Path], image_size: int, pool: ProcessPoolExecutor) -> Cost:
    """Decode the files on all cores, each its part, without Ray."""
    cores = os.cpu_count() or 1
    parts = [paths[len(paths) * i // cores : len(paths) * (i + 1) // cores] for i in range(cores)]
    watch = Stopwatch()
    list(pool.map(decode_all, parts, [image_size] * cores))
    return watch.stop()


def run_prepare(source: Path, store: Path, image_size: int) -> tuple[Cost, float]:
    """The job on a started Ray cluster with warm workers; and the seconds that starting took."""
    cores = os.cpu_count() or 1
    flags = ["--source", str(source), "--prepare.image-size", str(image_size)]
    begin_s = time.perf_counter()
    with ray_session():
        warm = ["--prepare.limit", str(100 * cores), "--store", f"{store}-warm"]
        assert prepare.main([*flags, *warm]) == 0
        watch = Stopwatch()
        assert prepare.main([*flags, "--store", str(store)]) == 0
        cost = watch.stop()
    shutil.rmtree(store)
    shutil.rmtree(f"{store}-warm")
    return cost, watch.wall_s - begin_s


def measure_rate(num_studies: int, image_size: int, rounds: int) -> None:
    """Print what bare decoding and the whole job cost, in turns.

    Bare: one process a core reads and decodes its part of the same files, which are in the page
    cache, and does nothing else. The job: from reading the tables to the manifest, with Ray's
    daemons on the same cores; Ray's start, which does not depend on the number of studies, is
    printed apart. `others` is the fraction of the cores that other processes used.
    """
    cores = os.cpu_count() or 1
    bare, job, starts = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_linked_source(
            folder / "source", list_images(folder / "phantoms"), num_studies=num_studies
        )
        paths = sorted((source / "stage_2_train_images").iterdir())
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            decode_in_pool(paths[: 50 * cores], image_size, pool)
            for _ in range(rounds):
                bare.append(decode_in_pool(paths, image_size, pool))
                cost, start_s = run_prepare(source, folder / "store", image_size)
                job.append(cost)
                starts.append(start_s)
    print(f"\n{num_studies} studies, {image_size} px, {cores} cores, {rounds} rounds in turns")
    print(f"  {'median of the rounds':24} {'images/s/core':>14} {'CPU ms/study':>13}")
    for label, costs in (("bare decode", bare), ("jobs.prepare", job)):
        rate = num_studies / statistics.median(cost.wall_s for cost in costs) / cores
        cpu_ms = statistics.median(cost.cpu_s for cost in costs) / num_studies * 1e3
        print(f"  {label:24} {rate:14.0f} {cpu_ms:13.2f}")
    for label, fractions in (
        ("rate kept", [b.wall_s / j.wall_s for b, j in zip(bare, job, strict=True)]),
        ("of CPU time", [b.cpu_s / j.cpu_s for b, j in zip(bare, job, strict=True)]),
        ("others: bare", [cost.others_s / cost.wall_s / cores for cost in bare]),
        ("others: job", [cost.others_s / cost.wall_s / cores for cost in job]),
    ):
        rows = " ".join(f"{one:.2f}" for one in fractions)
        print(f"  {label:24} {statistics.median(fractions):14.2f}   by round: {rows}")
    print(f"  Ray's start and the workers' imports took {statistics.median(starts):.0f} s besides")


class Sampler(threading.Thread):
    """Largest memory of a job's driver and of its largest worker, while it runs."""

    def __init__(self, job: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.job, self.driver, self.worker, self.all_workers = job, 0, 0, 0

    def run(self) -> None:
        while self.job.is_running() and self.job.status() != psutil.STATUS_ZOMBIE:
            try:
                self.driver = max(self.driver, self.job.memory_full_info().uss)
                workers = [
                    child.memory_full_info().uss
                    for child in self.job.children(recursive=True)
                    if child.name().startswith("ray::")
                ]
            except psutil.Error:
                continue
            self.worker = max([self.worker, *workers])
            self.all_workers = max(self.all_workers, sum(workers))
            time.sleep(0.1)


def measure_memory(sizes: list[int]) -> None:
    """Print what the driver and the workers of jobs.prepare hold at most, by number of studies."""
    print("headers-only phantoms; MiB that are a process's own (USS), at most")
    print(f"  {'studies':>8} {'driver':>8} {'worker':>8} {'workers':>8} {'seconds':>8}")
    for number in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            originals = folder / "originals"
            originals.mkdir()
            rng = np.random.default_rng(0)
            for i in range(100):
                pixels = rng.integers(0, 256, (HEADERS_ONLY, HEADERS_ONLY), dtype=np.uint8)
                (originals / f"{i}.dcm").write_bytes(encode_dicom(pixels))
            source = write_linked_source(
                folder / "source", sorted(originals.iterdir()), num_studies=number
            )
            command = [sys.executable, "-m", "jobs.prepare", "--source", str(source)]
            command += ["--store", str(folder / "store"), "--prepare.image-size", "32"]
            started_s = time.perf_counter()
            job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            sampler = Sampler(psutil.Process(job.pid))
            sampler.start()
            assert job.wait() == 0
            seconds = time.perf_counter() - started_s
            sampler.join(5)
            held = [x / 2**20 for x in (sampler.driver, sampler.worker, sampler.all_workers)]
            print(f"  {number:8} " + " ".join(f"{x:8.0f}" for x in held) + f" {seconds:8.0f}")


def measure_index() -> None:
    """Print how long the metadata of all of RSNA takes, where it is at hand, and its audit."""
    metadata = find_real_data("rsna-metadata")
    if metadata is None:
        print("index: the metadata of all of RSNA is not at hand")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in metadata.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "stage_2_train_images").mkdir()
        started_s = time.perf_counter()
        source = read_source(str(folder), {"PNEUMO_HASH_KEY": "the benchmark's"})
        indexed_s = time.perf_counter()
        config = Config().split
        audit = split_studies(source.studies, config, seed=0, has_patients=True).audit
        print(f"index: {len(source.studies)} studies in {indexed_s - started_s:.1f} s")
        print(f"split and audit: {time.perf_counter() - indexed_s:.1f} s")
        print(audit.model_dump_json(indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rate", "memory", "index"])
    parser.add_argument("--num-studies", type=int, default=26_684)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    if options.what == "rate":
        measure_rate(options.num_studies, options.image_size, options.rounds)
    elif options.what == "memory":
        measure_memory(options.sizes)
    else:
        measure_index()
    return 0


if __name__ == "__main__":
    sys.exit(main())
