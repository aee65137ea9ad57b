"""What training loses between the bare step and Ray: images/s by the step, by fit, by jobs.train.

    python -m tests.benchmarks.train [--rounds 3] [--epochs 3] [--num-studies 700]
        [--image-size 128] [--phantoms 60] [--cpus-per-worker 2] [--recipe gpu] …

    step      Learner.learn on one synthetic batch again and again
    fit       pneumo.training.fit.fit in one process, from a store through the loader
    ray       jobs.train with one worker; Ray runs all the while
    whole     as step, a batch being one micro-batch, where it is several

ResNet-18 with random weights; what else is given is a flag of jobs.train, and what is not is the
default. As many threads as a worker of so many CPUs has; on the GPU where there is one. Each runs
in a process of its own, and in a round they take turns in random order. Ratios are of neighbours in
one round: a busy machine spoils them less than it spoils rates, and the load is printed beside
them. Epochs are short here, so what is done once an epoch, a checkpoint, weighs more than on RSNA;
"median step" leaves it out. The first epoch of a run, which reads the store, does not count.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from jobs import prepare
from jobs.ray_cluster.session import WORKER_ENVIRONMENT, ray_session
from jobs.training.job import train as train_job
from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.loading.loader import Batch
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model, initialise
from pneumo.training.callbacks import Callbacks
from pneumo.training.checkpoint_writer import read_history
from pneumo.training.fit import fit
from pneumo.training.train_step import Learner
from tests.benchmarks.sources import write_linked_source

GOAL = 0.95
UNCOUNTED_STEPS = 3
ONE_MICRO_BATCH = "whole"
RATIOS = (
    ("fit", "step", f"from the store / bare step, goal {GOAL}"),
    ("ray", "fit", f"under Ray / alone, goal {GOAL}"),
    ("step", ONE_MICRO_BATCH, "in micro-batches / in one"),
)


class Rate(NamedTuple):
    """Images per second."""

    mean: float
    by_median_step: float


# --- the variants, each in a new process


def choose_device(threads: int) -> torch.device:
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as fit has it
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_step(config: Config, *, image_size: int, num_steps: int) -> Rate:
    """Steps of the learner on one batch of noise, after those that do not count."""
    device = choose_device(config.cluster.cpus_per_worker)
    train = config.train
    model = build_model(config.model.backbone)
    initialise(model, config.model, seed=0)
    learner = Learner(model, train, pos_weight=3.0, seed=0, world=World(), device=device)
    learner.network.train()
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(train.batch_size, 1, image_size, image_size, generator=rng)
    targets = (torch.rand(train.batch_size, generator=rng) < 0.25).float()
    keys = tuple(str(i) for i in range(train.batch_size))
    batch = Batch(images.to(device), targets.to(device), keys)
    ends_s, before = [], torch.zeros(1)
    for step in range(num_steps + UNCOUNTED_STEPS):
        outcome = learner.learn(batch, epoch=0, step=step, lr=train.lr)
        before.tolist()  # as in fit, the host runs one step ahead of a GPU
        before = outcome
        ends_s.append(time.perf_counter())
    steps_s = [b - a for a, b in pairwise(ends_s[UNCOUNTED_STEPS - 1 :])]
    return Rate(
        train.batch_size / statistics.fmean(steps_s), train.batch_size / statistics.median(steps_s)
    )


def measure_fit(config: Config, *, store_url: str, run_url: str) -> Rate:
    """A whole run without Ray."""
    device = choose_device(config.cluster.cpus_per_worker)
    fit(
        config,
        store_url=store_url,
        run_url=run_url,
        world=World(),
        device=device,
        callbacks=Callbacks(),
    )
    return read_rate(run_url, config.train.batch_size)


def read_rate(run_url: str, batch_size: int) -> Rate:
    """The rate of a run's epochs after the first."""
    epochs = read_history(run_url)[1:]
    rates = [rate for epoch in epochs if (rate := epoch["images_per_s"]) is not None]
    steps_s = [step_s for epoch in epochs if (step_s := epoch["step_p50_s"]) is not None]
    return Rate(statistics.fmean(rates), batch_size / statistics.median(steps_s))


def run_fresh(function: Callable[[], Rate]) -> Rate:
    """The rate, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


# --- the rounds


def write_store(folder: Path, options: argparse.Namespace) -> str:
    """A store of links to a few phantoms: as many studies, no time to draw them."""
    write_phantoms(folder / "phantoms", num_studies=options.phantoms, seed=0)
    images = sorted((folder / "phantoms" / "stage_2_train_images").iterdir())
    source = write_linked_source(folder / "source", images, num_studies=options.num_studies)
    store = str(folder / "store")
    flags = ["--source", str(source), "--store", store, "--prepare.image-size"]
    assert prepare.main([*flags, str(options.image_size)]) == 0
    return store


def list_variants(
    options: argparse.Namespace, flags: Sequence[str], store_url: str, run_url: str
) -> dict[str, Callable[[], Rate]]:
    """Name -> function that measures its rate; URLs of runs begin with `run_url`."""
    flags = ["--model.weights", "random", "--tracking.mode", "disabled", *flags]
    flags += ["--train.epochs", str(options.epochs), "--store", store_url]
    flags += ["--cluster.cpus-per-worker", str(options.cpus_per_worker)]
    config = parse_command_line("train", flags).config
    whole = config.train.model_copy(update={"micro_batch_size": config.train.batch_size})
    step = partial(measure_step, image_size=options.image_size, num_steps=options.steps)
    alone = partial(measure_fit, config, store_url=store_url, run_url=f"{run_url}-fit")

    def measure_ray() -> Rate:
        train_job(parse_command_line("train", [*flags, "--run", f"{run_url}-ray"]))
        return read_rate(f"{run_url}-ray", config.train.batch_size)

    variants: dict[str, Callable[[], Rate]] = {
        "step": partial(run_fresh, partial(step, config)),
        "fit": partial(run_fresh, alone),
        "ray": measure_ray,
    }
    if whole != config.train:
        one = partial(step, config.model_copy(update={"train": whole}))
        variants[ONE_MICRO_BATCH] = partial(run_fresh, one)
    return variants


def measure(options: argparse.Namespace, flags: Sequence[str]) -> dict[str, list[Rate]]:
    """Rates of each variant by round."""
    rates: dict[str, list[Rate]] = defaultdict(list)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="pneumo-bench-") as scratch, ray_session():
        store_url = write_store(Path(scratch), options)
        for number in range(1, options.rounds + 1):
            variants = list_variants(
                options, flags, store_url, str(Path(scratch) / f"run-{number}")
            )
            for name in rng.sample(list(variants), len(variants)):
                rate, load = variants[name](), os.getloadavg()[0]
                rates[name].append(rate)
                print(f"round {number}: {name} {rate.mean:.1f} images/s, load {load:.1f}")
    return rates


# --- the report


def tabulate(rates: dict[str, list[Rate]]) -> list[str]:
    rows = [f"{'variant':<12}{'images/s':>10}{'median step':>13}"]
    for name, found in rates.items():
        mean, median = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append(f"{name:<12}{mean:>10.1f}{median:>13.1f}")
    return rows


def compare(rates: dict[str, list[Rate]]) -> list[str]:
    """Each ratio, by images/s and by the median step."""
    rows = []
    for name, other, label in RATIOS:
        if not rates.keys() >= {name, other}:
            continue
        pairs = list(zip(rates[name], rates[other], strict=True))
        mean = spread([ours.mean / theirs.mean for ours, theirs in pairs])
        median = spread([ours.by_median_step / theirs.by_median_step for ours, theirs in pairs])
        rows.append(f"{f'{name} / {other}':<16}{mean}, by median step {median}   {label}")
    return rows


def spread(ratios: Sequence[float]) -> str:
    """The median over rounds, and the range."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of a run; the first does not count")
    parser.add_argument("--steps", type=int, default=10, help="of the bare step in a round")
    parser.add_argument("--num-studies", type=int, default=700)
    parser.add_argument("--phantoms", type=int, default=60, help="pictures behind the studies")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--cpus-per-worker", type=int, default=2)
    options, flags = parser.parse_known_args(arguments)
    if options.epochs < 2:
        parser.error("--epochs: at least 2, as the first does not count")
    # Before torch starts its threads in the processes to come; Ray's workers take it over.
    os.environ |= {"OMP_NUM_THREADS": str(options.cpus_per_worker), **WORKER_ENVIRONMENT}
    rates = measure(options, flags)
    where = "a GPU" if torch.cuda.is_available() else "no GPU"
    print(
        f"\n{options.num_studies} studies, {options.image_size} px, {options.cpus_per_worker} CPUs "
        f"and {where}; medians of {options.rounds} rounds"
    )
    print("\n".join([*tabulate(rates), "", *compare(rates)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
