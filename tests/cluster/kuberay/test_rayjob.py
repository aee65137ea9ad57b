"""What Python adds to an overlay for one run; pure, no cluster and no kustomize needed."""

import copy
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kuberay import rayjob
from cluster.submission import Submission, plan
from pneumo.command_line import parse_command_line
from pneumo.errors import ConfigError
from tests import CHECKOUT

Document = dict[str, Any]
BASE = CHECKOUT / "k8s" / "base" / "rayjob.yaml"
PLACES = "--store s3://b/store --run s3://b/runs/1"
BIG = "--train.batch-size 1024"


@pytest.fixture
def base() -> Document:
    document: Document = yaml.safe_load(BASE.read_text())
    return copy.deepcopy(document)  # anchors make parts of it one object


def _plan(command: str, **environ: str) -> Submission:
    job, *argv = shlex.split(command)
    now = datetime(2026, 1, 2)
    return plan(job, argv, environ, remote=True, now=now)


def _build(base: Document, command: str, environ: dict[str, str] | None = None, **more: Any) -> Any:
    submission = _plan(command, **(environ or {}))
    name = more.pop("name", submission.id)
    return rayjob.build([{"kind": "ServiceAccount"}, base], submission, name=name, **more)


def _workers(job: Document) -> Document:
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(group)


def _environment(job: Document) -> dict[str, str]:
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return {item["name"]: item["value"] for item in head["containers"][0]["env"]}


def test_the_command_that_submits_a_run_again_has_all_its_settings(
    base: Document, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nlr = 2e-4\n")
    environ = {"PNEUMO_MODEL__WEIGHTS": "random", "PNEUMO_HASH_KEY": "hidden", "AWS_REGION": "x"}
    asked = f"train {PLACES} --recipe {tmp_path}/mine.toml"
    command = rayjob.command(_build(base, asked, environ, overlay="gpu-spot"))
    settings, submit, flags = command.partition(
        "python -m cluster submit --target k8s --overlay gpu-spot train "
    )
    assert submit
    assert "hidden" not in settings
    variables = dict(word.split("=", 1) for word in shlex.split(settings))
    config = _plan(asked, **environ).config
    assert parse_command_line("train", shlex.split(flags), variables).config == config


def _give_gpus(base: Document, number: str = "1", cpus: str = "4") -> None:
    container = _workers(base)["template"]["spec"]["containers"][0]
    size = {"cpu": cpus, "memory": "16Gi", "nvidia.com/gpu": number}
    container["resources"] = {"requests": size, "limits": size}


def test_only_what_differs_is_set(base: Document) -> None:
    before = copy.deepcopy(base)
    job = _build(base, f"train {PLACES} --cluster.num-workers 3 --cluster.cpus-per-worker 4")
    assert base == before
    assert job["metadata"]["name"].startswith("train-1-")
    name = job["metadata"]["name"]
    assert job["spec"]["entrypoint"].startswith(
        f"python -m jobs.terminal.log_keeper s3://b/runs/1/logs/{name}/20260102-000000 "
        "python -m jobs.train --store s3://b/store"
    )
    assert job["metadata"]["annotations"]["pneumo/entrypoint"].startswith("python -m jobs.train")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["initContainers"][0]["args"] == [
        "--ray", "2.60.0", "--reads", "s3://b/store", "--writes", "s3://b/runs/1",
    ]  # fmt: skip
    group = _workers(job)
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    spec = job["spec"]
    for template in (
        spec["rayClusterSpec"]["headGroupSpec"]["template"],
        group["template"],
        spec["submitterPodTemplate"],
    ):
        assert template["metadata"]["labels"]["pneumo/run"] == name
    for each in ("entrypoint", "rayClusterSpec", "submitterPodTemplate"):
        job["spec"].pop(each), before["spec"].pop(each)
    assert job["spec"] == before["spec"]


def test_attempts_share_a_log_folder_and_later_submissions_do_not(base: Document) -> None:
    """Who finds an earlier log takes finished work for its own: `predict --source tuesday` must not
    find the predictions of monday, which write to the same place."""
    folders = []
    for source, day in (("monday", 5), ("tuesday", 6)):
        argv = ["--source", f"s3://b/{source}", "--run", "s3://b/runs/1", "--output", "s3://b/out"]
        submission = plan("predict", argv, {}, remote=True, now=datetime(2026, 1, day))
        job = rayjob.build([copy.deepcopy(base)], submission, name=submission.id)
        retry = rayjob.copy_for_retry(job, f"{submission.id}-2")
        assert f"log_keeper {rayjob.log_folder(job)} " in job["spec"]["entrypoint"]
        assert f"log_keeper --again {rayjob.log_folder(retry)} " in retry["spec"]["entrypoint"]
        folders += [rayjob.log_folder(job), rayjob.log_folder(retry)]
    assert folders == [
        f"s3://b/out/logs/{submission.id}{number}/202601{day}-000000"
        for day in ("05", "06")
        for number in ("", "-2")
    ]


@pytest.mark.parametrize(
    ("gpus", "cpus", "flags", "replicas"),
    [
        (None, "4", "--cluster.num-workers 4 --cluster.cpus-per-worker 4", 4),
        (None, "4", "--cluster.num-workers 4 --cluster.cpus-per-worker 2", 2),
        (None, "4", f"--cluster.num-workers 5 --cluster.cpus-per-worker 2 {BIG}", 3),
        ("1", "8", "--cluster.num-workers 4", 4),
        ("8", "96", f"--cluster.num-workers 64 --cluster.cpus-per-worker 12 {BIG}", 8),
        ("8", "96", f"--cluster.num-workers 9 --cluster.cpus-per-worker 12 {BIG}", 2),
        ("8", "8", f"--cluster.num-workers 16 --cluster.use-gpu false {BIG}", 2),
    ],
)
def test_there_are_pods_for_the_jobs_workers(
    base: Document, gpus: str | None, cpus: str, flags: str, replicas: int
) -> None:
    if gpus:
        _give_gpus(base, gpus, cpus)
    assert _workers(_build(base, f"train {PLACES} {flags}"))["replicas"] == replicas


def test_a_job_that_takes_what_there_is_keeps_the_overlays_pods(base: Document) -> None:
    prepare = "prepare --source s3://b/raw --store s3://b/store"
    assert _workers(_build(base, prepare))["replicas"] == 2
    assert _workers(_build(base, prepare, workers=40))["replicas"] == 40
    assert _workers(_build(base, f"tune {PLACES}"))["replicas"] == 2
    several = f"tune {PLACES} --tune.workers-per-trial 5 --cluster.cpus-per-worker 4"
    assert _workers(_build(base, several))["replicas"] == 5
    with pytest.raises(ConfigError, match=r"--workers 4: .* need 5 pods"):
        _build(base, several, workers=4)


def test_gpus_that_are_still_to_come_are_asked_for(base: Document) -> None:
    assert "PNEUMO_CLUSTER__USE_GPU" not in _environment(_build(base, f"train {PLACES}"))
    _give_gpus(base)
    assert _environment(_build(base, f"train {PLACES}"))["PNEUMO_CLUSTER__USE_GPU"] == "true"
    chosen = _build(base, f"train {PLACES} --cluster.use-gpu false")
    assert "PNEUMO_CLUSTER__USE_GPU" not in _environment(chosen)


def test_secrets_stay_here_and_the_rest_reaches_the_pods(base: Document) -> None:
    environ = {
        "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_ACCESS_KEY_ID": "hidden",
        "WANDB_API_KEY": "hidden", "AWS_SESSION_TOKEN": "hidden", "PNEUMO_HASH_KEY": "hidden",
        "AWS_REGION": "eu-north-1", "WANDB_NOTES": "$(HOME)", "PNEUMO_REVISION": "the laptop's",
    }  # fmt: skip
    job = _build(base, f"train {PLACES}", environ)
    assert "hidden" not in yaml.safe_dump(job)
    assert _environment(job) == {
        "HOME": "/tmp",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "AWS_REGION": "eu-north-1",
        "WANDB_NOTES": "$$(HOME)",
    }
    assert _plan(f"train {PLACES}", **environ).secrets == (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "WANDB_API_KEY",
    )


@pytest.mark.parametrize(
    ("command", "expected"),
    [(f"train {PLACES}", False), ("prepare --source s3://b/raw --store s3://b/store", True)],
)
def test_only_what_derives_keys_gets_their_secret(
    base: Document, command: str, *, expected: bool
) -> None:
    cluster = _build(base, command)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            names = [source["secretRef"]["name"] for source in container["envFrom"]]
            assert names == ["pneumo-secrets", *(["pneumo-hash-key"] if expected else [])]


def test_an_image_is_for_every_container(base: Document) -> None:
    job = _build(base, f"train {PLACES}", image="r.io/x@sha256:1")
    assert yaml.safe_dump(job).count("image: r.io/x@sha256:1") == 4


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        (f"train {PLACES} --tracking.group 'a;b'", {}, r"'a;b': the command passes through shells"),
        (f"train {PLACES} --tracking.group '$(id)'", {}, r"the command passes through shells"),
        (f"train {PLACES} --tracking.group 'a b'", {}, r"'a b': the command passes through shells"),
        ("train --store 's3://b/`x`' --run s3://b/r", {}, "the command passes through shells"),
        (f"train {PLACES} --cluster.cpus-per-worker 5", {}, r"worker pod of the overlay has 4;"),
        (f"train {PLACES} --cluster.use-gpu true", {}, "worker pods have no GPU"),
        (
            f"train {PLACES} --cluster.num-workers 9 {BIG}",
            {"workers": 2},
            "--workers 2: .* need 3 pods",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sent(
    base: Document, command: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _build(base, command, **more)


def test_an_overlay_without_its_rayjob_is_refused(base: Document) -> None:
    submission = _plan(f"train {PLACES}")
    with pytest.raises(ConfigError, match="renders to 0 RayJobs, expected 1"):
        rayjob.build([{"kind": "ServiceAccount"}], submission, name="x")
    base["spec"]["rayClusterSpec"]["workerGroupSpecs"] *= 2
    with pytest.raises(ConfigError, match="2 workerGroupSpecs, expected 1"):
        rayjob.build([base], submission, name="x")


@pytest.mark.parametrize(
    ("is_followed", "annotations", "wait_s"),
    [
        (True, {}, 1800),
        (False, {}, 600),
        (False, {rayjob.WAIT_AGAIN: "true"}, 1800),
    ],
    ids=["a follower stops it", "nobody does", "nobody shall"],
)
def test_all_attempts_wait_for_nodes_as_long_as_one(
    base: Document, is_followed: bool, annotations: dict[str, str], wait_s: int
) -> None:
    base["metadata"]["annotations"] = annotations
    job = _build(base, f"train {PLACES}", is_followed=is_followed)
    spec = job["spec"]
    assert (spec["preRunningDeadlineSeconds"], spec["backoffLimit"]) == (wait_s, 2)
    # Whoever follows an unattended run later does not stop it after a third of the wait.
    retries = job["metadata"]["annotations"].get(rayjob.WAIT_AGAIN) == "true"
    assert retries is not is_followed
