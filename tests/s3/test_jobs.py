"""The whole way with store and run in a bucket of a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pneumo import storage
from pneumo.synthetic import write_phantoms

pytestmark = pytest.mark.s3


def _run(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(600)
def test_phantoms_become_a_report_in_a_bucket(bucket_url: str, tmp_path: Path) -> None:
    source = tmp_path / "phantoms"
    write_phantoms(source, num_studies=90, seed=3)
    (source / ".pneumo").mkdir()
    (source / ".pneumo" / "hash_key").write_text("the same split every time")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    store, run = f"{bucket_url}/store", f"{bucket_url}/runs/1"
    size = ("--prepare.image-size", "64")
    _run("jobs.prepare", "--source", str(source), "--store", store, *size, cwd=folder)
    _run(
        *("jobs.train", "--store", store, "--run", run, "--model.weights", "random"),
        *("--train.epochs", "1", "--train.batch-size", "16", "--tracking.mode", "disabled"),
        cwd=folder,
    )
    _run("jobs.evaluate", "--store", store, "--run", run, cwd=folder)
    metrics = json.loads(storage.read_bytes(f"{run}/metrics.json"))
    assert 0 <= metrics["test"]["auroc"]["value"] <= 1
    assert storage.exists(f"{run}/report.html")
    assert list(folder.iterdir()) == [], "nothing was to be written here"
