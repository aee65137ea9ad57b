"""The whole way, as a person runs it: by processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import ray
from moto.server import ThreadedMotoServer
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from pneumo.evaluation.predictions import Predictions
from pneumo.training.checkpoints import find_index, read_index
from tests.jobs.conftest import SMALL, Prepared, run_module
from tests.waiting import wait_until

REAL_STUDIES = Path(__file__).parents[3] / "shared" / "data" / "rsna-mini"


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module", autouse=True)
def _no_cluster_of_ours() -> Iterator[None]:
    """These tests start Ray in processes of their own; two clusters at once are too much here, and
    Ray's state API may ask the wrong one. Jobs that run later start their own."""
    ray.shutdown()
    yield
    ray.shutdown()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a loopback S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="pneumo-test")
    yield "s3://pneumo-test"
    server.stop()


@pytest.mark.slow
def test_the_demo_ends_with_a_report_and_goes_through_an_object_store(
    bucket: str, tmp_path: Path
) -> None:
    flags = ["--studies", "90", "--run", str(tmp_path / "run")]
    shown = run_module("jobs.demo", "--store", f"{bucket}/store", *flags, cwd=tmp_path)
    report = tmp_path / "run" / "train" / "report.html"
    assert str(report) in shown.stdout
    for name in ("auroc", "accuracy", "precision", "recall", "f1"):
        assert f"  {name} " in shown.stdout
    assert report.exists()
    assert "other users can read" not in shown.stderr
    assert not (tmp_path / "data" / "demo" / "store").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL_STUDIES.is_dir(), reason=f"no real studies at {REAL_STUDIES}")
def test_real_x_rays_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNEUMO_HASH_KEY", "only for this test")
    store, train = str(tmp_path / "store"), str(tmp_path / "train")
    small = [*SMALL, "--data.image-size", "64"]
    run_module("jobs.prepare", "--source", str(REAL_STUDIES), "--store", store, cwd=tmp_path)
    tune = ["--tune.num-trials", "2", "--tune.epochs", "1", "--run", str(tmp_path / "tune")]
    run_module("jobs.tune", "--store", store, *tune, *small, cwd=tmp_path)
    recipe = ["--recipe", str(tmp_path / "tune" / "best.toml"), "--train.epochs", "2"]
    workers = ["--cluster.num-workers", "2", "--tracking.mode", "disabled"]
    run_module("jobs.train", "--store", store, "--run", train, *recipe, *workers, cwd=tmp_path)
    run_module("jobs.evaluate", "--store", store, "--run", train, cwd=tmp_path)
    assert_evaluated(tmp_path / "train")


def assert_evaluated(run: Path) -> None:
    """All that an evaluation of real studies leaves is there, and says the same as scikit-learn."""
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"]["unit"] == "patient"
    predictions = Predictions.from_parquet((run / "predictions.parquet").read_bytes())
    assert len(predictions) == metrics["val"]["n"] + metrics["test"]["n"] > 50
    test, found = predictions.subset("test"), metrics["test"]
    assert found["fault"] is None
    expected = roc_auc_score(test.target, test.logit)
    assert found["auroc"]["value"] == pytest.approx(expected, abs=1e-9)
    assert found["average_precision"]["value"] == pytest.approx(
        average_precision_score(test.target, test.logit), abs=1e-9
    )
    saliency = found["saliency"]
    assert saliency["all"]["n"] + saliency["unscored"] == found["positives"]
    assert saliency["prior_studies"] > 50
    assert 0 < saliency["all"]["maps"]["prior"]["auprc"]["value"] < 1
    groups = {(group["by"], group["name"]): group for group in found["subgroups"]["groups"]}
    assert groups["view", "AP"]["n"] + groups["view", "PA"]["n"] == found["n"]
    for name in ("metrics.png", "prediction_grid.png", "gradcam_example.png"):
        with Image.open(run / "figures" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # not a blank sheet
    report = (run / "report.html").read_text()
    assert len(report.encode()) < 3_000_000
    assert f"{expected:.3f}" in report
    assert "adults and children together" in report


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(prepared: Prepared, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "jobs.train", "--store", str(prepared.store)),
        *("--run", str(run_folder), *SMALL, "--train.epochs", "60"),
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(
        lambda: process.poll() is not None or find_index(str(run_folder)) is not None,
        "the first checkpoint",
        timeout_s=240,
    )
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    stopped_at = read_index(str(run_folder)).latest.epoch
    assert stopped_at < 60
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    first = next(line for line in process.stderr if line.startswith(("model:", "error:")))
    assert first.startswith("model: resuming from epoch")
    # One signal has a checkpoint written; another leaves without waiting for it.
    process.send_signal(signal.SIGTERM)
    assert any(
        "writing a checkpoint (interrupt again to exit without one)" in line
        for line in process.stderr
    )
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "no checkpoint within" not in errors
    assert not read_index(str(run_folder)).finished


@pytest.mark.slow
def test_ranks_that_do_not_find_each_other_are_a_failure_of_the_start(
    prepared: Prepared, tmp_path: Path
) -> None:
    workers = ["--cluster.num-workers", "2", "--cluster.max-failures", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jobs.train", "--store", str(prepared.store), *SMALL, *workers),
            *("--run", str(tmp_path / "run")),
        ],
        cwd=tmp_path,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "no-such-interface"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    (again,) = [line for line in lines if "resuming with" in line]
    assert again.startswith("workers did not start (")
    assert again.endswith("failure 1 of 1: resuming with 2 workers from the start")
    assert "no-such-interface" in lines[-1]
