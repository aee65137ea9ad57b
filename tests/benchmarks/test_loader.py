"""The benchmark of input pipelines runs at a tiny size, so that no change breaks it unnoticed."""

import os
import subprocess
import sys

import pytest

from tests import CHECKOUT
from tests.s3 import server


@pytest.mark.slow
def test_pipelines_are_compared_and_those_that_cannot_run_are_left_out() -> None:
    pipelines = ("memory-first", "memory-later", "npy", "png", "memory-s3", "memory")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.benchmarks.loader", "--only", *pipelines),
            *("--num-samples", "128", "--memory-samples", "200"),
            *("--image-size", "32", "--rounds", "1"),
        ],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if name != server.ENDPOINT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "memory: 0 MB decoded" in done.stdout
    assert "128 samples, 32 px" in done.stdout
    assert done.stdout.count("  goal ") == 4
    assert "left out: ours: memory, first epoch, S3: no S3 server" in done.stdout
