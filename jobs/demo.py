"""The whole workflow on phantoms, in one Ray session: synthetic -> prepare -> tune -> train ->
evaluate."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from jobs.terminal.entry_point import check_invocation, find_run_url, run_main, tell
from pneumo import storage
from pneumo.command_line import Invocation, Parser, parse_command_line
from pneumo.errors import FinishedError

PHANTOMS = Path("data/demo/phantoms")
SEARCH = ("--tune.algorithm", "random", "--tune.early-stopping", "none", "--tune.num-trials", "2")
"""Concurrent trials end in varying order, and early stopping compares a trial with those that have
ended: with it, the demo would differ from run to run."""
FEW_EPOCHS = ("--train.epochs", "10")


def demo(argv: Sequence[str]) -> None:
    """Draw phantoms, prepare them, search, train with two workers or on one GPU, and evaluate."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.studies < 1:
        parser.error(f"--studies: got {options.studies}, expected 1 or more")
    if options.run == "":
        parser.error("--run: got '', expected a folder or URL")
    run_url = find_run_url("demo", options.run)
    for job, flags in (
        ("prepare", ("--source", "phantoms")),
        ("tune", ("--recipe", "fast", *SEARCH)),
        ("train", FEW_EPOCHS),
        ("evaluate", ("--run", run_url)),
    ):
        parse_command_line(job, ["--store", options.store, *flags])
    started_s = time.monotonic()
    run_demo(storage.normalise(options.store), run_url, options.studies, show_logs=options.debug)
    minutes, seconds = divmod(round(time.monotonic() - started_s), 60)
    tell(f"\nthe demo took {minutes} min {seconds} s; open the report above")


def run_demo(store_url: str, run_url: str, num_studies: int, *, show_logs: bool) -> None:
    """Run each job in turn, as its own command would; what an earlier demo finished is not
    repeated."""
    # Imported after the command line is parsed, as these take seconds.
    import ray
    import torch

    from jobs.evaluation.job import evaluate_run
    from jobs.preparation import prepare
    from jobs.ray_cluster.session import ray_session
    from jobs.training.job import train
    from jobs.tuning.job import tune
    from jobs.tuning.search_wandb import BEST
    from pneumo.dataset.phantoms.source_folder import write_phantoms
    from pneumo.dataset.study_keys import PRIVATE_FOLDER

    tune_url, train_url = storage.join(run_url, "tune"), storage.join(run_url, "train")
    recipe = storage.join(tune_url, BEST)
    phantoms = PHANTOMS.with_name(f"phantoms-{num_studies}")
    in_store = ("--store", store_url)
    steps: list[tuple[str, Callable[[Invocation], None], list[str]]] = [
        ("prepare", prepare, ["--source", str(phantoms), *in_store]),
        ("tune", tune, [*in_store, "--run", tune_url, "--recipe", "fast", *SEARCH]),
        ("train", train, [*in_store, "--run", train_url, "--recipe", recipe, *FEW_EPOCHS]),
        ("evaluate", evaluate_run, [*in_store, "--run", train_url]),
    ]
    tell(f"1/5 phantoms: {num_studies} chest X-rays drawn from a seed, no patient's")
    write_phantoms(phantoms, num_studies=num_studies, seed=0, num_processes=None)
    _fix_hash_key(phantoms / PRIVATE_FOLDER)
    with ray_session(show_logs=show_logs):
        resources = ray.cluster_resources()
        workers = count_workers(resources)
        precision = choose_precision(torch.cpu.get_capabilities(), resources)
        for number, (job, run, flags) in enumerate(steps, start=2):
            if job in ("train", "evaluate"):
                flags += ["--cluster.num-workers", str(workers)]
            if job in ("tune", "train"):
                flags += ["--train.precision", precision]
            tell(f"\n{number}/5 {job}: python -m jobs.{job} {shlex.join(flags)}")
            try:
                run(check_invocation(job, flags))
            except FinishedError:
                if job == "evaluate":  # then the whole demo is
                    raise
                tell(f"{job}: was finished before")


def count_workers(resources: Mapping[str, float]) -> int:
    """Two workers, to show that there may be several; but at most one per GPU, if there are any."""
    return min(2, int(resources.get("GPU", 0)) or 2)


def choose_precision(instructions: Mapping[str, object], resources: Mapping[str, float]) -> str:
    """`train.precision`: bfloat16 also on a CPU that has instructions for it, by
    `torch.cpu.get_capabilities`; a training takes 0.7 of the time there."""
    fast = instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    return "bfloat16" if fast and not resources.get("GPU") else "auto"


def _fix_hash_key(folder: Path) -> None:
    """Write a known secret, which gives the same split on every machine; phantoms need none."""
    path = folder / "hash_key"
    path.parent.mkdir(exist_ok=True)
    path.write_text("phantoms need no secret")
    path.chmod(0o600)  # else `prepare` would warn


def _parser() -> Parser:
    parser = Parser(prog="python -m jobs.demo", description=__doc__)
    parser.add_argument("--store", default="data/demo/store", help="where the shards go")
    parser.add_argument("--run", help="where the results go; default runs/demo-<time>")
    parser.add_argument("--studies", type=int, default=640, help="phantoms to draw (default 640)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


main = partial(run_main, "demo", demo)

if __name__ == "__main__":
    sys.exit(main())
