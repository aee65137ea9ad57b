"""The whole way with store and run in a bucket of a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pneumo import storage
from pneumo.synthetic import write_phantoms
from tests.jobs.conftest import run_module

pytestmark = pytest.mark.s3


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
    run_module("jobs.prepare", "--source", str(source), "--store", store, *size, cwd=folder)
    run_module(
        *("jobs.train", "--store", store, "--run", run, "--model.weights", "random"),
        *("--train.epochs", "1", "--train.batch-size", "16", "--tracking.mode", "disabled"),
        cwd=folder,
    )
    run_module("jobs.evaluate", "--store", store, "--run", run, cwd=folder)
    metrics = json.loads(storage.read_bytes(f"{run}/metrics.json"))
    assert 0 <= metrics["test"]["auroc"]["value"] <= 1
    assert storage.exists(f"{run}/report.html")
    assert list(folder.iterdir()) == [], "nothing was to be written here"
