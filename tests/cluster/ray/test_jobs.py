"""Ray Jobs against a real `ray start --head` with token authentication."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster.ray import jobs, sent_code
from cluster.ray.client import Client, connect
from cluster.submission import Submission, plan
from cluster.targets import OutOfReachError, Started
from pneumo.errors import ConfigError
from pneumo.version import REVISION, find_revision
from tests import CHECKOUT
from tests.cluster.http_proxy import FaultyProxy, Rule

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster
from tests.cluster.ray.probes import follow_to_end, make_probe, read_numbers, start


def test_code_and_environment_arrive_and_the_log_comes_back(client: Client) -> None:
    asked = ("AWS_REGION", REVISION)
    job_id = start(client, make_probe("ok", 25, 0, 0, *asked, AWS_REGION="eu-north-1"))
    log, code = follow_to_end(client, job_id)
    assert code == 0
    assert read_numbers(log) == list(range(25))
    assert "folder jobs pneumo\n" in log
    assert "AWS_REGION is eu-north-1\n" in log
    assert f"{REVISION} is {find_revision(CHECKOUT) or 'absent'}\n" in log
    assert log == client.log_text(job_id)


def test_exit_codes_and_reasons(client: Client) -> None:
    asked = {2: 2, 3: 1, 130: 130}
    ids = {code: start(client, make_probe(f"exit-{code}", 1, 0, code)) for code in asked}
    absent = start(client, Submission("train", "probe-absent", "no-such-program", "/x", "a"))
    for code, expected in asked.items():
        _, got = follow_to_end(client, ids[code])
        assert got == expected
        assert jobs.failure(client.details(ids[code])) == f"exit code {code}"
    assert follow_to_end(client, absent)[1] == 1
    assert "no command 'python'" in jobs.failure(client.details(absent))


def test_submitting_twice_runs_once(client: Client) -> None:
    asked = make_probe("twice", 100, 0.1, 0)
    first = jobs.submit(client, asked, sent_code.collect())
    again = jobs.submit(client, asked, sent_code.collect())
    assert first == Started("probe-twice", already_running=False)
    assert again == Started("probe-twice", already_running=True)
    with pytest.raises(ConfigError, match=r"is being written by probe-twice with other settings"):
        jobs.submit(client, make_probe("twice", 100, 0.1, 0, settings="b"), sent_code.collect())
    jobs.cancel(client, first.id)
    third = jobs.submit(client, make_probe("twice", 1, 0, 0), sent_code.collect())
    assert third == Started("probe-twice-2", already_running=False)
    assert follow_to_end(client, third.id)[1] == 0


def test_a_job_whose_submission_was_not_answered_is_found(
    client: Client, ray_cluster: RayCluster
) -> None:
    with FaultyProxy(ray_cluster.address) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        proxy.rules.append(Rule("POST", "/api/jobs/", "drop after"))
        started = jobs.submit(through, make_probe("unanswered", 1, 0, 0), sent_code.collect())
        assert started == Started("probe-unanswered", already_running=False)
        proxy.rules.append(Rule("POST", "/api/jobs/", "drop before"))
        with pytest.raises(OutOfReachError, match="no answer"):
            jobs.submit(through, make_probe("unheard", 1, 0, 0), sent_code.collect())
    assert follow_to_end(client, started.id)[1] == 0
    assert "probe-unheard" not in {info.submission_id for info in jobs.list_jobs(client)}


def test_down_leaves_the_jobs_of_others_alone(client: Client, ray_cluster: RayCluster) -> None:
    other = client.submit_job(entrypoint="sleep 600", submission_id="somebody-elses")
    mine = start(client, replace(make_probe("mine", 600, 0.1, 0), owner="me@here"))
    yours = start(client, replace(make_probe("yours", 600, 0.1, 0), owner="you@here"))
    asked = ray_cluster.command("down", "--owner", "me@here")
    assert asked.returncode == 2
    assert mine in asked.stderr.splitlines()[-1]
    assert other not in asked.stderr.splitlines()[-1]
    done = ray_cluster.command("down", "--owner", "me@here", "--yes")
    assert done.returncode == 0, done.stderr
    left = done.stderr.splitlines()[0]
    assert left.startswith("not cancelled, as they are not of me@here: ")
    assert {other, yours} == set(left.rpartition(": ")[2].split(", "))
    assert client.details(mine).status.is_terminal()
    assert not client.details(yours).status.is_terminal()
    assert ray_cluster.command("down", "--all", "--yes").returncode == 0
    assert client.details(yours).status.is_terminal()
    assert not client.details(other).status.is_terminal()
    client.stop_job(other)


@pytest.mark.slow
def test_a_bucket_out_of_reach_is_told_by_a_preflight_job(ray_cluster: RayCluster) -> None:
    done = ray_cluster.command(
        *("submit", "train", "--store", "s3://bucket/store", "--run", "s3://bucket/runs/1"),
        AWS_ENDPOINT_URL="http://127.0.0.1:1",
        AWS_ACCESS_KEY_ID="somebody",
        AWS_SECRET_ACCESS_KEY="not-to-be-seen",
        AWS_REGION="eu-north-1",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: preflight: s3://bucket/"), line
    assert "no answer within 20 s, seen from the cluster" in line
    assert done.stdout == ""
    assert "preflight" not in ray_cluster.command("list").stdout


def test_a_forwarded_port_is_not_this_machine(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Its head's session is not below the temporary folder here, as behind `make forward`."""
    elsewhere: dict[str, Any] = {"RAY_TMPDIR": str(tmp_path), "AWS_PROFILE": "laptop"}
    refused = ray_cluster.command("submit", "train", "--store", "s3://b/s", **elsewhere)
    assert refused.returncode == 2
    assert "--run is required on a remote cluster" in refused.stderr
    prepare = ["--source", "/nowhere", "--store", "/nowhere/store"]
    sent = ray_cluster.command("submit", "prepare", *prepare, **elsewhere)
    assert "AWS_PROFILE" not in sent.stderr.partition("environment: ")[2]
    assert "AWS_PROFILE" in sent.stderr.partition("environment: ")[0]  # warned of


def test_a_preflight_that_passes(client: Client, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").touch()  # an empty source is none
    asked = plan(
        "prepare",
        ["--source", str(tmp_path), "--store", str(tmp_path / "store")],
        {},
        remote=False,
        now=datetime.now(),
    )
    said = jobs.preflight(client, asked, sent_code.collect())
    python = ".".join(map(str, sys.version_info[:3]))
    assert said.startswith(f"preflight: Python {python}, Ray {version('ray')}; reached {tmp_path}")
    assert not (tmp_path / "store").exists()
    gone = replace(asked, preflight=asked.preflight.replace("--reads", "--reads /nowhere --reads"))
    with pytest.raises(ConfigError, match="preflight: /nowhere: nothing is there"):
        jobs.preflight(client, gone, sent_code.collect())
    assert not [job for job in jobs.list_jobs(client) if "preflight" in job.submission_id]


def test_the_users_mistake_that_only_the_cluster_sees(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    done = ray_cluster.command(
        *("submit", "prepare", "--source", str(tmp_path / "nowhere")),
        *("--store", str(tmp_path / "store")),
        AWS_SECRET_ACCESS_KEY="not-to-be-seen",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/nowhere" in done.stdout.splitlines()[-1]
    sent, submitted, ended = done.stderr.splitlines()
    job_id = ended.split()[0]
    assert submitted.startswith(f"submitted as {job_id}: python -m jobs.prepare --source ")
    assert "MiB before compression; environment: AWS_SECRET_ACCESS_KEY" in sent
    assert ended == f"{job_id} failed: exit code 2"
    status = ray_cluster.command("status", job_id)
    assert "why     exit code 2" in status.stdout
    assert job_id in ray_cluster.command("list").stdout
    shown = done.stdout + done.stderr + status.stdout + status.stderr
    assert "not-to-be-seen" not in shown


@pytest.mark.slow
def test_a_train_on_an_empty_store_is_the_users_mistake(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "mine.toml").write_text('[model]\nweights = "random"\n')
    done = ray_cluster.command(
        *("submit", "train", "--recipe", str(tmp_path / "mine.toml")),
        *("--store", str(tmp_path / "store"), "--run", str(tmp_path / "run")),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "environment: PNEUMO_MODEL, " in done.stderr
    assert str(tmp_path / "store") in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_prepare_train_and_evaluate_on_the_cluster(ray_cluster: RayCluster, tmp_path: Path) -> None:
    source, store, run = (str(tmp_path / name) for name in ("source", "store", "run"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pneumo.synthetic",
            "--out",
            source,
            "--studies",
            "150",
        ],
        cwd=CHECKOUT,
        env=dict(ray_cluster.environ),
        capture_output=True,
        check=True,
        timeout=120,
    )
    for job, *flags in (
        ("prepare", "--source", source, "--store", store, "--prepare.image-size", "64"),
        (
            *("train", "--store", store, "--run", run, "--recipe", "fast"),
            *("--data.image-size", "64", "--train.epochs", "1", "--train.batch-size", "16"),
        ),
        (
            *("evaluate", "--store", store, "--run", run),
            *("--evaluate.bootstrap-resamples", "100", "--evaluate.saliency", "false"),
            *("--evaluate.pictures", "1"),
        ),
    ):
        done = ray_cluster.command("submit", job, *flags, timeout_s=180)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].endswith("succeeded")
    judged = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert judged["test"]["n"] > 0
    assert "test: " in done.stdout
