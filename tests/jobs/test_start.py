"""`--help` and mistakes are answered before anything heavy is imported, and each process of a job
imports only what it uses."""

import subprocess
import sys

import pytest

HEAVY = {
    *("torch", "torchvision", "torchmetrics", "ray", "optuna", "kubernetes", "wandb"),
    *("scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "s3fs", "aiobotocore"),
}
"""Packages that take a tenth of a second or more each."""

RUN = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as left:
    print("exit", left.code, *sys.modules)
"""
NOWHERE = "/nowhere/at/all"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        *((f"jobs.{job} --help", 0) for job in ("prepare", "train", "tune", "evaluate", "predict")),
        ("jobs.export --help", 0),
        ("jobs.track --help", 0),
        *((f"{module} --help", 0) for module in ("jobs.demo", "jobs.preflight")),
        *((f"pneumo.{module} --help", 0) for module in ("synthetic", "dashboards")),
        ("cluster --help", 0),
        ("cluster submit train --help", 0),
        ("cluster submit train --store s --train.lrr 1", 2),
        ("cluster list", 2),
        ("jobs.train", 2),
        ("jobs.train --store s --train.lr=-1", 2),
        ("jobs.train --store s --recipe none", 2),
        ("jobs.tune --store s --tune.num-trial 3", 2),
        (f"jobs.train --store {NOWHERE}", 2),
        (f"jobs.tune --store {NOWHERE}", 2),
        (f"jobs.evaluate --store {NOWHERE} --run {NOWHERE}", 2),
        (f"jobs.predict --source {NOWHERE} --run {NOWHERE} --output {NOWHERE}", 2),
        (f"jobs.prepare --source {NOWHERE} --store {NOWHERE}", 2),
        (f"jobs.export --run {NOWHERE} --output {NOWHERE}", 2),
        (f"jobs.track --run {NOWHERE}", 2),
    ],
)
def test_nothing_heavy_is_imported_for_an_answer(command: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *command.split()],
        capture_output=True,
        text=True,
        check=True,
        env={},
    )
    marker, exit_code, *modules = done.stdout.splitlines()[-1].split()
    assert (marker, exit_code) == ("exit", str(code))
    assert len(done.stderr.splitlines()) == (1 if code else 0)
    assert HEAVY & {name.split(".")[0] for name in modules} == set()


SCIENCE = {"torchvision", "torchmetrics", "sklearn", "pandas", "matplotlib", "optuna"}


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("jobs.ray_cluster.worker_setup", HEAVY - {"ray"}),  # every worker process, and the actor
        ("jobs.training.messages", HEAVY - {"ray"}),  # that keeps messages
        ("pneumo.dataset.shard_tasks", {"torch", "ray", "scipy.stats", *SCIENCE}),  # tasks
        ("jobs.evaluation.ray_scoring", {"scipy.stats", *SCIENCE}),
        ("jobs.preparation", {"torch", "scipy.stats", *SCIENCE}),  # drivers
        ("jobs.training.job", SCIENCE - {"pandas"}),  # which Ray Train imports
        ("jobs.training.trainer", {"sklearn", "matplotlib", "optuna"}),  # workers of a training
        ("jobs.evaluation.job", {"torchvision", "torchmetrics", "optuna", "pytorch_grad_cam"}),
        ("jobs.prediction", {"scipy.stats", *SCIENCE} - {"matplotlib"}),
    ],
)
def test_a_process_of_a_job_imports_what_it_uses(module: str, unused: set[str]) -> None:
    code = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, module], capture_output=True, text=True, check=True
    )
    assert unused & set(done.stdout.splitlines()[-1].split()) == set()
