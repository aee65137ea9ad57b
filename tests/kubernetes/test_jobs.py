"""Prepare, train, tune, evaluate and predict on the cluster, and the same commands here.

With a real S3 server and the tests' W&B backend, both listening on this machine. Train uses two
workers on two nodes, tune two trials on two worker pods.
"""

import base64
import io
import json
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pytest
import s3fs

from pneumo.dataset.phantoms.source_folder import write_phantoms
from tests import CHECKOUT
from tests.kubernetes import namespaces
from tests.kubernetes.cluster import KubeCluster, Team
from tests.kubernetes.conftest import TeamMaker
from tests.pneumo.reporting.tracking import wandb_server

pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.usefixtures("needs_bucket"),
    pytest.mark.timeout(1500),
]

EPOCHS, TRIALS = 2, 2
API_KEY = "k" * 40
CLOSE = 1e-4
"""Of losses and logits: two machines add in different orders."""
_RUN_TIMEOUT_S = 600
_ALL_JOBS_TIMEOUT_S = 1200
_TRAINING = (
    *("--recipe", "fast", "--data.image-size", "64", "--train.batch-size", "16"),
    *("--train.micro-batch-size", "8", "--cluster.cpus-per-worker", "1"),
)
_FEW_PICTURES = (*("--evaluate.bootstrap-resamples", "100", "--evaluate.pictures", "1"),)
_JOBS = {
    "prepare": ["--source", "{source}", "--store", "{store}", "--prepare.image-size", "64"],
    "train": [
        *["--store", "{store}", "--run", "{runs}/train", "--cluster.num-workers", "2"],
        *(*_TRAINING, "--train.epochs", str(EPOCHS), "--tracking.mode", "online"),
    ],
    "tune": [
        *[
            "--store",
            "{store}",
            "--run",
            "{runs}/tune",
            "--tune.epochs",
            "1",
            "--tracking.mode",
            "disabled",
        ],
        *(*_TRAINING, "--tune.num-trials", str(TRIALS)),
    ],
    "evaluate": [
        *["--store", "{store}", "--run", "{runs}/train", "--cluster.num-workers", "2"],
        *("--cluster.cpus-per-worker", "1", *_FEW_PICTURES, "--tracking.mode", "online"),
    ],
    "predict": [
        *["--source", "{source}/stage_2_train_images", "--run", "{runs}/train"],
        *["--output", "{runs}/predicted", "--cluster.cpus-per-worker", "1"],
    ],
}
_STEPS = (("prepare",), ("train", "tune"), ("evaluate", "predict"))
"""The jobs of a step run at the same time, and need what earlier steps wrote."""


@dataclass(frozen=True)
class Place:
    """A machine or a cluster on which the jobs ran, and what they left in the bucket."""

    url: str
    files: s3fs.S3FileSystem
    nodes: set[str] = field(default_factory=set)
    """On which the training's workers ran."""

    def read(self, path: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.url}/{path}"))

    def table(self, path: str) -> pd.DataFrame:
        """A parquet file, its rows in the order of the first column."""
        rows = pd.read_parquet(io.BytesIO(self.read(path)))
        return rows.sort_values(rows.columns[0], ignore_index=True)

    def epochs(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of the training."""
        return [json.loads(line) for line in self.read("runs/train/metrics.jsonl").splitlines()]


@dataclass(frozen=True)
class BothRuns:
    """Both places, and what W&B received."""

    local: Place
    cluster: Place
    wandb: wandb_server.Backend


@pytest.fixture(scope="module")
def both(
    kube: KubeCluster,
    make_team: TeamMaker,
    files: s3fs.S3FileSystem,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[BothRuns]:
    folder = tmp_path_factory.mktemp("both")
    team = make_team(folder)
    source = f"{team.bucket}/source"
    write_phantoms(folder / "source", num_studies=120, seed=3)
    files.put(str(folder / "source"), source, recursive=True)
    local, cluster = (Place(f"{team.bucket}/{name}", files) for name in ("local", "cluster"))
    try:
        with wandb_server.serve(API_KEY, kube.host) as wandb, ThreadPoolExecutor(3) as threads:
            secret = {"data": {"WANDB_API_KEY": base64.b64encode(API_KEY.encode()).decode()}}
            kube.ask("PATCH", f"{team.path('v1', 'secrets')}/pneumo-secrets", secret)
            team = team.with_environ(WANDB_BASE_URL=wandb.url, WANDB_MODE="online")
            # Side by side: a run waits for its pods more than it computes.
            local_jobs = threads.submit(_run_locally, team, local, source)
            for jobs in _STEPS:
                step = [threads.submit(_run_on_cluster, team, cluster, source, job) for job in jobs]
                for run in step:
                    run.result()
            local_jobs.result()
            yield BothRuns(local, cluster, wandb)
    finally:
        namespaces.remove(team)


def _run_on_cluster(team: Team, place: Place, source: str, job: str) -> None:
    workers = ("--workers", "2") if job == "tune" else ()
    words = ("submit", *workers, job, *_flags(job, source, place))
    done = team.command(*words, timeout_s=_RUN_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    if job == "train":  # its pods stay for half a minute
        place.nodes.update(_nodes_of_workers(team))


def _run_locally(team: Team, place: Place, source: str) -> None:
    secret = {"PNEUMO_HASH_KEY": namespaces.HASH_KEY, "WANDB_API_KEY": API_KEY}
    jobs = json.dumps([[job, *_flags(job, source, place)] for job in _JOBS])
    log = team.folder / "local_jobs.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "tests.kubernetes.local_jobs", jobs],
            env=team.shell(**secret), cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            process.wait(_ALL_JOBS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # Python writes what each thread is doing
            process.wait()
    assert process.returncode == 0, log.read_text()


def _flags(job: str, source: str, place: Place) -> list[str]:
    places = {"source": source, "store": f"{place.url}/store", "runs": f"{place.url}/runs"}
    return [flag.format(**places) for flag in _JOBS[job]]


def _nodes_of_workers(team: Team) -> set[str]:
    pods = team.pods(component="worker")
    return {p["spec"]["nodeName"] for p in pods if p["metadata"]["name"].startswith("train-")}


def test_the_store_is_the_same(both: BothRuns) -> None:
    assert both.cluster.read("store/manifest.json") == both.local.read("store/manifest.json")


def test_two_workers_on_two_nodes_train_as_one_machine_does(both: BothRuns) -> None:
    cluster, local = both.cluster.epochs(), both.local.epochs()
    assert [row["epoch"] for row in cluster] == list(range(1, EPOCHS + 1))
    assert [row["data/samples"] for row in cluster] == [row["data/samples"] for row in local]
    for key in ("train/loss", "val/loss"):
        assert [row[key] for row in cluster] == pytest.approx(
            [row[key] for row in local], abs=CLOSE
        )
    assert len(both.cluster.nodes) == 2


def test_two_trials_are_compared_as_on_one_machine(both: BothRuns) -> None:
    cluster, local = (
        place.table("runs/tune/trials.parquet") for place in (both.cluster, both.local)
    )
    assert len(cluster) == TRIALS
    same = ["name", "state", "seed", "chosen", "epochs", "train.lr", "train.pos_weight"]
    pd.testing.assert_frame_equal(cluster[same], local[same])
    assert list(cluster["objective"]) == pytest.approx(list(local["objective"]), abs=CLOSE)
    best = [
        tomllib.loads(p.read("runs/tune/best.toml").decode()) for p in (both.cluster, both.local)
    ]
    assert best[0] == best[1]


def test_evaluation_and_predictions_are_those_of_one_machine(both: BothRuns) -> None:
    for path in ("runs/train/predictions.parquet", "runs/predicted/predictions.parquet"):
        tables = (place.table(path) for place in (both.cluster, both.local))
        # A checkpoint's name has digits of whoever wrote it.
        cluster, local = (table.drop(columns="checkpoint", errors="ignore") for table in tables)
        pd.testing.assert_frame_equal(cluster, local, check_exact=False, rtol=0, atol=CLOSE)
        assert len(cluster) > 0
    metrics = [json.loads(p.read("runs/train/metrics.json")) for p in (both.cluster, both.local)]
    aurocs = [one["test"]["auroc"]["value"] for one in metrics]
    assert aurocs[0] == pytest.approx(aurocs[1], abs=0.01)


def test_wandb_received_the_same_from_both(both: BothRuns) -> None:
    histories = [both.wandb.history(run) for run in both.wandb.runs]
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in histories]
    cluster, local = (training for training in losses if training)
    assert cluster == pytest.approx(local, abs=CLOSE)
    assert len(cluster) == EPOCHS
    runs = both.wandb.runs.items()
    one, other = (
        both.wandb.summary(name) for name, run in runs if run.get("jobType") == "evaluate"
    )
    assert one["eval/test/auroc"] == pytest.approx(other["eval/test/auroc"], abs=0.01)
    assert list(both.wandb.exit_codes.values()) == 4 * [0]
    assert both.wandb.unknown == []
