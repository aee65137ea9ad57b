"""What a search costs: epochs to a result of the same quality, and seconds a trial on top of it.

    python -m tests.benchmarks.tune quality  [--seeds 3] [--studies 400] [--trials 18] [--epochs 9]
    python -m tests.benchmarks.tune overhead [--trials 6] [--studies 300]

quality   jobs.tune with its defaults (TPE, ASHA) beside a plain random search that stops nobody,
          both on phantoms, each seed with draws of its own. Told are the epochs that each search
          trained, its best objective, and after how many epochs the default search had a finished
          trial as good as the random search's best (less one standard error of the difference of
          two trials, about what val can tell apart; and as good outright); and the trials an hour
          and core hours of both.
overhead  trials of one epoch: `fit` in one process, by Tune in used processes, and as Ray Train
          runs of one and of two workers; then how long a trial waits for its data when each reads
          the store, and when all share one copy. Seconds a trial, in one run.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from jobs.preparation import prepare
from jobs.ray_cluster.session import ray_session
from jobs.training.trainer import Training, build_trainer
from jobs.tuning.job import search
from jobs.tuning.trial_records import read_estimate, trial_config, trial_url
from jobs.tuning.trial_runs import load_shared_data
from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.sample_order import World
from pneumo.training.callbacks import Callbacks
from pneumo.training.fit import fit
from pneumo.tuning.search import Search

GOAL = 3.0
SETTINGS = {
    "model.weights": "random",
    "train.batch_size": 32,
    "data.image_size": 40,
    "tracking.mode": "disabled",
}


def make_store(folder: Path, studies: int) -> tuple[str, Manifest]:
    """Phantoms of 64 px, trained on at 40: a search is many trainings."""
    source, store = folder / "phantoms", folder / "store"
    write_phantoms(source, num_studies=studies, seed=11, num_processes=None)
    (source / ".pneumo").mkdir()
    (source / ".pneumo" / "hash_key").write_text("the same split every time")
    size = ("--prepare.image-size", "64")
    flags = ["--source", str(source), "--store", str(store), *size]
    prepare(parse_command_line("prepare", flags, {}))
    return str(store), read_manifest(str(store))


def compare_quality(options: argparse.Namespace, folder: Path) -> None:
    """Print a line a seed, and the median ratio."""
    ratios, reached = [], []
    with ray_session():
        store, manifest = make_store(folder, options.studies)
        for seed in range(options.seeds):
            found = {}
            for name, more in (
                ("random", {"tune.algorithm": "random", "tune.early_stopping": "none"}),
                ("default", {}),
            ):
                changes = {
                    "seed": seed,
                    "tune.num_trials": options.trials,
                    "tune.epochs": options.epochs,
                    **more,
                }
                config = override(Config(), {**SETTINGS, **changes})
                started = time.perf_counter()
                found[name] = search(config, manifest, store, str(folder / f"{name}-{seed}"))
                hours = (time.perf_counter() - started) / 3600
                cores = ray.cluster_resources()["CPU"]
                print(
                    f"seed {seed}: {name}: {options.trials / hours:.0f} trials an hour, "
                    f"{hours * cores:.3f} core hours"
                )
            ratios.append(found["random"].epochs / found["default"].epochs)
            reached.append(describe_seed(seed, found, folder))
    print(
        f"epochs of a whole search, random / default: median {statistics.median(ratios):.2f}; "
        f"until as good as random's best, within the standard error: median "
        f"{statistics.median(reached):.2f} (goal {GOAL})"
    )


def describe_seed(seed: int, found: dict[str, Search], folder: Path) -> float:
    """Print what both searches of a seed found; how many times fewer epochs were needed."""
    random, default = found["random"], found["default"]
    bests = {name: one.choice.best.objective(one.config.tune) for name, one in found.items()}
    error = _error(random, default, folder)
    wanted = (bests["random"] or 0.0) - error
    epochs, outright = (count_until(default, value) for value in (wanted, bests["random"] or 0.0))
    ratio = random.epochs / epochs if epochs else 0.0
    print(
        f"seed {seed}: random {random.epochs} epochs, best {bests['random']:.4f}; default "
        f"{default.epochs} epochs, best {bests['default']:.4f}; standard error of their difference "
        f"{error:.4f}; as good within it after {epochs} epochs ({ratio:.2f} times fewer), outright "
        f"after {outright}",
        flush=True,
    )
    return ratio


def _error(one: Search, other: Search, folder: Path) -> float:
    """Of the difference of their best trials, in pairs."""
    runs = [folder / f"{name}-{one.config.seed}" for name in ("random", "default")]
    found = [
        read_estimate(trial_url(str(run), each.choice.best.name), each.config.tune)
        for run, each in zip(runs, (one, other), strict=True)
    ]
    assert found[0] is not None
    assert found[1] is not None
    return found[0].error_of_difference(found[1])


def count_until(found: Search, wanted: float) -> int | None:
    """Epochs trained by all trials up to the first, in their order, that ended as good as wanted;
    None where none did."""
    spent = 0
    for trial in sorted(found.trials, key=lambda trial: trial.name):
        spent += trial.epochs
        value = trial.objective(found.config.tune)
        if trial.state == "finished" and value is not None and value >= wanted:
            return spent
    return None


def measure_overhead(options: argparse.Namespace, folder: Path) -> None:
    """Print seconds a trial, of each kind."""
    changes = {"tune.num_trials": options.trials, "tune.epochs": 1}
    more = {"tune.early_stopping": "none", "tune.algorithm": "random"}
    config = override(Config(), {**SETTINGS, **changes, **more})
    torch.set_num_threads(1)
    with ray_session():
        store, manifest = make_store(folder, options.studies)
        shared = load_shared_data(config, manifest, store)
        splits = shared.fetch_splits(None)
        alone = [_fit(config, store, folder / f"alone-{i}", {}) for i in range(options.trials)]
        with_copy = [
            _fit(config, store, folder / f"held-{i}", splits) for i in range(options.trials)
        ]
        rows = [("fit in one process, reading the store", statistics.median(alone))]
        rows.append(("fit in one process, one copy shared", statistics.median(with_copy)))
        for name, workers in (("Tune, used processes", 1), ("Tune over Ray Train, 2 workers", 2)):
            trials = {"tune.workers_per_trial": workers, "cluster.num_workers": workers}
            run = str(folder / f"tune-{workers}")
            started = time.perf_counter()
            search(override(config, trials), manifest, store, run)
            at_once = 2 // workers
            rows.append(
                (f"{name}, {at_once} at a time", (time.perf_counter() - started) / options.trials)
            )
        started = time.perf_counter()
        trial = trial_config(config, {})
        build_trainer(Training(trial, store, str(folder / "train")), trial.cluster).fit()
        rows.append(("Ray Train alone, one worker", time.perf_counter() - started))
    for what, seconds in rows:
        print(f"{what:<42} {seconds:7.2f} s a trial", flush=True)


def _fit(config: Config, store: str, run: Path, splits: dict[str, InMemorySplit]) -> float:
    started = time.perf_counter()
    fit(
        trial_config(config, {}),
        store_url=store,
        run_url=str(run),
        world=World(),
        device=torch.device("cpu"),
        callbacks=Callbacks(),
        shared_splits=splits,
    )
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality")
    quality.add_argument("--seeds", type=int, default=3)
    quality.add_argument("--studies", type=int, default=400)
    quality.add_argument("--trials", type=int, default=18)
    quality.add_argument("--epochs", type=int, default=9)
    overhead = commands.add_parser("overhead")
    overhead.add_argument("--trials", type=int, default=6)
    overhead.add_argument("--studies", type=int, default=300)
    options: Any = parser.parse_args(argv)
    run = {"quality": compare_quality, "overhead": measure_overhead}[options.command]
    with tempfile.TemporaryDirectory(prefix="pneumo-tune-") as folder:
        run(options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
