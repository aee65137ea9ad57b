"""What jobs.prepare costs beside bare decoding, and what memory it takes for sources of any size.

    python -m tests.benchmarks.prepare rate [--num-studies 26684] [--image-size 224]
    python -m tests.benchmarks.prepare memory [--sizes 1000 10000 100000]
    python -m tests.benchmarks.prepare index

Ratios are taken in one run; wall times are of this machine and of what else it does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import ray

from jobs import prepare
from jobs.session import ray_session
from pneumo.config import Config
from pneumo.dicom import read_study_image
from pneumo.splits import split_studies
from pneumo.studies import read_source
from tests.benchmarks.sources import find_real_data, list_images, write_linked_source
from tests.conftest import encode_dicom

HEADERS_ONLY = 32  # pixels of an image's side: enough to be one


def decode_all(paths: list[Path], image_size: int) -> float:
    """Seconds that one process takes to read and decode these files, without anything else."""
    for path in paths[:20]:
        read_study_image(path.read_bytes(), image_size)
    started_s = time.perf_counter()
    for path in paths:
        read_study_image(path.read_bytes(), image_size)
    return time.perf_counter() - started_s


def measure_rate(num_studies: int, image_size: int) -> None:
    """Print images per second and core: bare, bare on every core at once, and the whole job."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_linked_source(
            folder / "source", list_images(folder / "phantoms"), num_studies=num_studies
        )
        paths = sorted((source / "stage_2_train_images").iterdir())
        part = len(paths) // cores
        alone = part / decode_all(paths[:part], image_size)
        with ProcessPoolExecutor(cores) as pool:
            parts = [paths[i * part : (i + 1) * part] for i in range(cores)]
            times = list(pool.map(decode_all, parts, [image_size] * cores))
        together = part / max(times)
        flags = ["--source", str(source), "--prepare.image-size", str(image_size)]
        with ray_session():
            warm = ["--prepare.limit", str(100 * cores), "--store", str(folder / "warm")]
            assert prepare.main([*flags, *warm]) == 0
            started_s = time.perf_counter()
            assert prepare.main([*flags, "--store", str(folder / "store")]) == 0
            job = num_studies / (time.perf_counter() - started_s) / cores
        print(f"\n{num_studies} studies, {image_size} px, {cores} cores, images/s/core")
        for label, rate in (
            ("bare decode, one process", alone),
            ("bare decode, every core busy", together),
            ("jobs.prepare, Ray running", job),
        ):
            print(f"  {label:30} {rate:7.0f}   {rate / together:5.2f}")


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


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rate", "memory", "index"])
    parser.add_argument("--num-studies", type=int, default=26_684)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    arguments = parser.parse_args()
    if arguments.what == "rate":
        measure_rate(arguments.num_studies, arguments.image_size)
    elif arguments.what == "memory":
        measure_memory(arguments.sizes)
    else:
        measure_index()
    ray.shutdown()


if __name__ == "__main__":
    main()
