"""The whole way on phantoms, in one Ray session: synthetic -> prepare -> tune -> train ->
evaluate."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray

from jobs.evaluate import evaluate_run
from jobs.prepare import prepare
from jobs.ray_cluster.session import ray_session
from jobs.terminal.entry_point import run_main, say
from jobs.train import train
from jobs.tune import tune
from jobs.tuning.search_wandb import BEST
from pneumo import storage
from pneumo.config import Invocation, parse_command_line
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.source import PRIVATE_FOLDER

PHANTOMS = Path("data/demo/phantoms")


def demo(argv: Sequence[str]) -> None:
    """Draw phantoms, prepare them, search, train with two workers or on one GPU, evaluate; say
    where the report is."""
    options = _parser().parse_args(argv)
    started = time.monotonic()
    run_url = storage.join(options.run or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    store_url, tune_url = storage.normalise(options.store), storage.join(run_url, "tune")
    train_url = storage.join(run_url, "train")
    recipe = storage.join(tune_url, BEST)
    phantoms = PHANTOMS.with_name(f"phantoms-{options.studies}")
    steps: list[tuple[str, Callable[[Invocation], None], list[str]]] = [
        ("prepare", prepare, ["--source", str(phantoms), "--store", store_url]),
        ("tune", tune, ["--store", store_url, "--run", tune_url, "--recipe", "fast"]),
        ("train", train, ["--store", store_url, "--run", train_url, "--recipe", recipe]),
        ("evaluate", evaluate_run, ["--store", store_url, "--run", train_url]),
    ]
    say(f"1/5 phantoms: {options.studies} chest X-rays drawn from a seed, no patient's")
    write_phantoms(phantoms, num_studies=options.studies, seed=0, progress=True)
    _fix_hash_key(phantoms)
    with ray_session(show_logs=options.debug):
        workers = count_workers(ray.cluster_resources())
        for number, (job, run, flags) in enumerate(steps, start=2):
            if job in ("train", "evaluate"):
                flags += ["--cluster.num-workers", str(workers)]
            say(f"\n{number}/5 {job}: python -m jobs.{job} {' '.join(flags)}")
            run(parse_command_line(job, flags))
    seconds = time.monotonic() - started
    say(f"\nthe whole way took {seconds // 60:.0f} min {seconds % 60:.0f} s; open the report above")


def count_workers(resources: Mapping[str, float]) -> int:
    """Two, to show that there may be several; where there are GPUs, as many as get one each."""
    return min(2, int(resources.get("GPU", 0)) or 2)


def _fix_hash_key(phantoms: Path) -> None:
    """Phantoms need no secret; a known one gives every machine the same split."""
    path = phantoms / PRIVATE_FOLDER / "hash_key"
    path.parent.mkdir(exist_ok=True)
    path.write_text("phantoms need no secret")
    path.chmod(0o600)  # or `prepare` warns of it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument("--store", default="data/demo/store", help="where the shards go")
    parser.add_argument("--run", help="where the results go; default runs/demo-<time>")
    parser.add_argument("--studies", type=int, default=700, help="phantoms to draw (default 700)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_main("demo", demo, argv)


if __name__ == "__main__":
    sys.exit(main())
