"""The benchmark of training runs, and tells its ratios."""

import os
import subprocess
import sys

import pytest

from tests import CHECKOUT


@pytest.mark.slow
def test_it_runs_and_tells_its_ratios() -> None:
    small = ("--rounds", "1", "--epochs", "2", "--steps", "1", "--num-studies", "120")
    sizes = ("--phantoms", "12", "--image-size", "32", "--cpus-per-worker", "1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.train", *small, *sizes],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "120 studies, 32 px, 1 CPUs and " in done.stdout
    rows = done.stdout.splitlines()
    for ratio in ("fit / step", "ray / fit", "step / whole"):
        assert any(row.startswith(ratio) and "by median step" in row for row in rows), ratio
