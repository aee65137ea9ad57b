"""All jobs with source, store and run in a bucket of a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from pneumo import storage
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.study_table import read_quarantine
from tests.identifiers import Identifiers
from tests.jobs.conftest import run_module

pytestmark = pytest.mark.s3


@pytest.mark.timeout(600)
def test_jobs_write_into_a_bucket_whose_address_is_in_a_profile(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own client of S3 would not find it."""
    profile = tmp_path / "config"
    profile.write_text(f"[default]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(profile))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    s3fs.S3FileSystem.clear_instance_cache()
    source = tmp_path / "phantoms"
    write_phantoms(source, num_studies=90, seed=3)
    (source / ".pneumo").mkdir()
    (source / ".pneumo" / "hash_key").write_text("the same split every time")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    store, run = f"{bucket_url}/store", f"{bucket_url}/runs/1"
    size = ("--prepare.image-size", "64")
    run_module("jobs.prepare", "--source", str(source), "--store", store, *size, cwd=folder)
    flags = ["--model.weights", "random", "--train.batch-size", "16"]
    flags += ["--tracking.mode", "disabled", "--store", store]
    run_module("jobs.train", "--run", run, "--train.epochs", "1", *flags, cwd=folder)
    search = ("--run", f"{bucket_url}/search", "--tune.num-trials", "1", "--tune.epochs", "1")
    run_module("jobs.tune", *search, *flags, cwd=folder)
    assert storage.exists(f"{bucket_url}/search/best.toml")
    run_module("jobs.evaluate", "--store", store, "--run", run, cwd=folder)
    metrics = json.loads(storage.read_bytes(f"{run}/metrics.json"))
    assert 0 <= metrics["test"]["auroc"]["value"] <= 1
    assert storage.exists(f"{run}/report.html")
    assert list(folder.iterdir()) == [], "nothing was to be written here"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray writes its logs; a short path, as its sockets lie there too."""
    folder = tempfile.mkdtemp(prefix="ray-")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_source_in_a_bucket_is_prepared_and_no_patient_is_named(
    bucket_url: str, tmp_path: Path, ray_folder: Path
) -> None:
    folder, source, store = tmp_path / "phantoms", f"{bucket_url}/rsna", f"{bucket_url}/store"
    write_phantoms(folder, num_studies=90, seed=3)
    identifiers = Identifiers.of(folder)
    storage.upload_folder(folder, source)
    lost = storage.list_urls(f"{source}/stage_2_train_images")[7]
    storage.remove(lost)

    def prepare(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
        places = ("--source", source, "--store", store, "--prepare.image-size", "64")
        return subprocess.run(
            [sys.executable, "-m", "jobs.prepare", *places, *flags, "--debug"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RAY_TMPDIR": str(ray_folder), "OMP_NUM_THREADS": "1", **environ},
        )

    without_key = prepare(PNEUMO_HASH_KEY="")
    assert without_key.returncode == 2
    assert f"{source}: set PNEUMO_HASH_KEY to a secret" in without_key.stderr
    failed = prepare(PNEUMO_HASH_KEY="of the tests")
    assert failed.returncode == 1
    assert "1 of 90 studies cannot be used (missing 1)" in failed.stderr
    done = prepare("--prepare.max-bad-fraction", "0.05", PNEUMO_HASH_KEY="of the tests")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(store)
    assert sum(entry.samples for entry in manifest.splits.values()) == 89
    assert [item.reason for item in read_quarantine(store, manifest)] == ["missing"]
    assert storage.exists(f"{source}/.pneumo/split_salts.json")
    local = tmp_path / "store"
    for url in storage.list_urls(store):
        storage.write_bytes(str(local / url.removeprefix(f"{store}/")), storage.read_bytes(url))
    said = [job.stdout + job.stderr for job in (without_key, failed, done)]
    assert list(ray_folder.rglob("worker-*"))
    assert identifiers.find_in(local, ray_folder, *said) == []
