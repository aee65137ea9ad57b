"""The Kubernetes target against a real kube-apiserver with RBAC; KubeRay and kubelet are played."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from cluster import kubernetes_api, kubernetes_jobs, ray_jobs, rayjob
from cluster.kubernetes_jobs import KubernetesTarget, LogCursor
from cluster.overlays import find_overlay
from cluster.submission import Submission
from pneumo.errors import AccessError, ConfigError
from tests.cluster.http_proxy import FaultyProxy, Rule
from tests.cluster.kube_operator import Kubelet, Operator
from tests.cluster.kube_server import KubeServer
from tests.cluster.renderer import NO_RENDERER

if TYPE_CHECKING:
    from conftest import RayCluster

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(NO_RENDERER), reason=NO_RENDERER),
]

CHECKOUT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("probe.py")
PROBES = Path(tempfile.gettempdir()) / f"probes-{os.getpid()}"
"""Where probes write, and their logs are kept."""
SUBMITTER, STRANGER = "submitter", "stranger"


@pytest.fixture
def operator(
    kube_server: KubeServer, kubelet: Kubelet, ray_cluster: RayCluster, namespace: str
) -> Iterator[Operator]:
    client = ray_jobs.connect(ray_cluster.address, ray_cluster.environ)
    with Operator(kube_server, client, kubelet, namespace) as playing:
        yield playing


def _target(
    server: KubeServer, namespace: str, *, user: str = SUBMITTER, url: str | None = None
) -> KubernetesTarget:
    """Our client as `user`; what may pass is waited for shortly."""
    path = server.kubeconfig(user, namespace=namespace, url=url)
    settings = kubernetes_api.kubernetes_client.Configuration()
    settings.retries = False
    kubernetes_api.kubernetes_config.load_kube_config(
        config_file=str(path), client_configuration=settings
    )
    client = kubernetes_api.kubernetes_client.ApiClient(settings)
    api = kubernetes_api.Api(client, namespace, "tests", patience_s=5.0)
    return KubernetesTarget(api, find_overlay("kind-cpu"), patience_s=5.0)


@pytest.fixture(scope="module", autouse=True)
def _no_litter() -> Iterator[None]:
    yield
    shutil.rmtree(PROBES, ignore_errors=True)


def _probe(name: str, *arguments: object, settings: str = "a") -> Submission:
    return Submission(
        job="prepare",
        id=f"probe-{name}",
        entrypoint=shlex.join(["python", str(PROBE), *map(str, arguments)]),
        target=str(PROBES / name),
        settings=settings,
        preflight="python -m jobs.preflight --writes /nowhere",
    )


def _follow(target: KubernetesTarget, job_id: str) -> tuple[list[int], list[str], int]:
    """The numbers of the probe's lines, what was said besides, the exit code."""
    text: list[str] = []
    notes: list[str] = []
    state = target.follow(job_id, text.append, lambda note: notes.append(str(note)))
    lines = "".join(text).splitlines()
    return (
        [int(line.split()[1]) for line in lines if line.startswith("line ")],
        notes,
        (state.exit_code),
    )


def _command(
    server: KubeServer, namespace: str, *arguments: str, timeout_s: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`python -m cluster` as a person with our Role."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PNEUMO_", "AWS_"))}
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments, "--target", "k8s"],
        env=own | {"KUBECONFIG": str(server.kubeconfig(SUBMITTER, namespace=namespace))} | environ,
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


# --- the whole way --------------------------------------------------------------------------------


@pytest.mark.slow
def test_submit_queue_run_log_and_exit_code(
    kube_server: KubeServer, namespace: str, operator: Operator, tmp_path: Path
) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pneumo.synthetic",
            "--out",
            str(source),
            "--studies",
            "40",
        ],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
        timeout=120,
    )
    operator.admitted = False
    threading.Timer(8.0, lambda: setattr(operator, "admitted", True)).start()
    done = _command(
        kube_server,
        namespace,
        *("submit", "--overlay", "gpu-spot-kueue", "prepare"),
        *("--source", str(source), "--store", str(store), "--prepare.image-size", "64"),
        AWS_SECRET_ACCESS_KEY="not-to-be-seen",
        WANDB_MODE="disabled",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (store / "manifest.json").is_file()
    said = done.stderr
    assert "overlay gpu-spot-kueue: 2 workers of" in said
    assert "not sent, for they are secrets: AWS_SECRET_ACCESS_KEY" in said
    assert "trouble: Kueue has no quota for it yet: couldn't assign flavors" in said
    job_id = said.splitlines()[-1].split()[0]
    assert said.splitlines()[-1] == f"{job_id} succeeded"
    assert done.stdout.strip()
    assert f"submitted as {job_id}: python -m jobs.prepare" in said

    listed = _command(kube_server, namespace, "list")
    assert job_id in listed.stdout
    assert "succeeded" in listed.stdout
    status = _command(kube_server, namespace, "status", job_id)
    assert f"writes  {store}" in status.stdout
    assert _command(kube_server, namespace, "logs", job_id).stdout == done.stdout
    everything = yaml.safe_dump(
        [
            kube_server.ask("GET", f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"),
            kube_server.ask("GET", f"/api/v1/namespaces/{namespace}/pods"),
        ]
    )
    assert "not-to-be-seen" not in everything + said + done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_train_outlives_its_head_and_is_evaluated(
    kube_server: KubeServer, namespace: str, operator: Operator, tiny_store: Callable[..., str]
) -> None:
    """By the next attempt, from the last checkpoint; then another RayJob judges the run."""
    store = tiny_store(train=64, val=24, test=24)
    run = Path(store).with_name(f"{Path(store).name}-run")
    operator.attempts_that_lose_the_head, operator.lost_after = 1, "epoch   1/2"
    small = ("--cluster.num-workers", "1", "--cluster.cpus-per-worker", "1")
    trained = _command(
        kube_server,
        namespace,
        *("submit", "--overlay", "cpu", "train", "--store", store, "--run", str(run), *small),
        *("--recipe", "fast", "--data.image-size", "32", "--train.epochs", "2"),
        *("--train.batch-size", "16"),
        WANDB_MODE="disabled",
        timeout_s=360,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "lost its node (NodeNotReady" in trained.stderr
    assert "another submitter took over" in trained.stderr
    assert "going on from epoch 1 " in trained.stdout
    epochs = re.findall(r"^epoch +(\d+)/2 ", trained.stdout, re.MULTILINE)
    assert epochs == ["1", "2"], trained.stdout  # none twice
    operator.attempts_that_lose_the_head = 0
    judged = _command(
        kube_server,
        namespace,
        *("submit", "--overlay", "cpu", "evaluate", "--store", store, "--run", str(run), *small),
        *("--evaluate.bootstrap-resamples", "100", "--evaluate.saliency", "false"),
        *("--evaluate.gallery-images", "1", "--evaluate.grid-images", "1"),
        WANDB_MODE="disabled",
        timeout_s=240,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert (run / "metrics.json").is_file()
    assert {path.name for path in (run / "logs").iterdir()} == {_job_id(trained), _job_id(judged)}
    assert "epoch   1/2" in _command(kube_server, namespace, "logs", _job_id(trained)).stdout


def _job_id(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1].split()[0]


@pytest.mark.slow
def test_the_users_mistake_is_exit_code_2_and_is_not_tried_again(
    kube_server: KubeServer, namespace: str, operator: Operator, tmp_path: Path
) -> None:
    done = _command(
        kube_server,
        namespace,
        *("submit", "--overlay", "gpu-ondemand", "prepare"),
        *("--source", str(tmp_path / "nowhere"), "--store", str(tmp_path / "store")),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/nowhere" in done.stdout
    assert "your mistake, which another attempt would repeat; called off" in done.stderr
    assert _command(kube_server, namespace, "list").stdout == ""


@pytest.mark.slow
def test_a_lost_head_is_told_and_the_next_attempt_is_followed(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    operator.attempts_that_lose_the_head, operator.lost_after = 1, "line 3"
    target = replace(_target(kube_server, namespace), overlay=find_overlay("gpu-ondemand"))
    started = target.submit(_probe(f"head-{namespace}", 15, 0.2, 0), lambda _: None)
    numbers, notes, code = _follow(target, started.id)
    assert code == 0
    assert numbers[-15:] == list(range(15))
    log = target.logs(started.id)
    first, last = log.split("--- the last attempt\n")
    assert re.match(r"--- the attempt of \d{8}-\d{6} UTC, kept in \S+/logs/\S+\n", first)
    assert "line 3\n" in first
    assert [int(line.split()[1]) for line in last.splitlines() if line.startswith("line ")] == (
        list(range(15))
    )
    shutil.rmtree(rayjob.log_folder(target.api.get_rayjob(started.id)))
    assert target.logs(started.id) == last
    assert [note for note in notes if "lost its node (NodeNotReady" in note], notes
    assert [note for note in notes if "another submitter took over" in note], notes


def test_an_image_that_cannot_be_pulled_is_told_while_it_waits(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    operator.image_there = False
    target = _target(kube_server, namespace)
    started = target.submit(_probe(f"image-{namespace}", 1, 0, 0), lambda _: None)
    threading.Timer(6.0, lambda: target.cancel(started.id)).start()
    _, notes, code = _follow(target, started.id)
    assert code == 130
    assert any("cannot pull pneumo:dev (ImagePullBackOff: manifest unknown)" in n for n in notes)
    assert len(notes) == len(set(notes))


def test_a_bucket_out_of_reach_calls_the_job_off(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    operator.preflight_says = "error: preflight: s3://b/r: no such bucket, seen from the cluster"
    target = _target(kube_server, namespace)
    started = target.submit(_probe(f"bucket-{namespace}", 1, 0, 0), lambda _: None)
    state = target.follow(started.id, lambda _: None, lambda _: None)
    assert (state.phase, state.exit_code) == ("failed", 2)
    assert state.why == "preflight: s3://b/r: no such bucket, seen from the cluster; called off"
    assert target.list() == []


def test_control_c_twice_cancels(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    target = _target(kube_server, namespace)
    started = target.submit(_probe(f"interrupt-{namespace}", 600, 0.1, 0), lambda _: None)
    with subprocess.Popen(
        [sys.executable, "-m", "cluster", "logs", started.id, "--follow", "--target", "k8s"],
        env={
            **os.environ,
            "KUBECONFIG": str(kube_server.kubeconfig(SUBMITTER, namespace=namespace)),
        },
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        try:
            assert following.stdout is not None
            assert following.stderr is not None
            while "line 1" not in (line := following.stdout.readline()):
                assert line, "the log ended"
            following.send_signal(signal.SIGINT)
            while "Ctrl-C again" not in (line := following.stderr.readline()):
                assert line, "no second thought"
            following.send_signal(signal.SIGINT)
            _, error = following.communicate(timeout=30)
        finally:
            following.kill()
    assert following.returncode == 130
    assert f"{started.id} cancelled" in error
    assert target.list() == []


# --- one run, once --------------------------------------------------------------------------------


def test_submitting_twice_runs_once(kube_server: KubeServer, namespace: str) -> None:
    target = _target(kube_server, namespace)
    asked = _probe("twice", 1, 0, 0)
    assert not target.submit(asked, lambda _: None).already_running
    assert target.submit(asked, lambda _: None).already_running
    with pytest.raises(ConfigError, match="is being written by probe-twice with other settings"):
        target.submit(_probe("twice", 1, 0, 0, settings="b"), lambda _: None)
    assert [state.id for state in target.list()] == ["probe-twice"]
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/probe-twice/status"
    ended = {"status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}}
    kube_server.ask("PATCH", path, ended, patch=True)
    assert target.submit(asked, lambda _: None).id == "probe-twice-2"


def test_what_a_running_job_has_otherwise_is_said(kube_server: KubeServer, namespace: str) -> None:
    target = _target(kube_server, namespace)
    target.submit(_probe("joined", 1, 0, 0), lambda _: None)
    notes: list[str] = []
    other = replace(
        target, image="r.io/x@sha256:1", workers=3, overlay=find_overlay("gpu-ondemand")
    )
    assert other.submit(_probe("joined", 1, 0, 0), notes.append).already_running
    assert notes == [
        "it goes on as it was started: 1 worker pods, not 3",
        "it goes on as it was started: image pneumo:dev, not r.io/x@sha256:1",
        "it goes on as it was started: worker pods of 1 cpu, 3Gi memory, not of 4 cpu, 16Gi "
        "memory, 1 nvidia.com/gpu",
    ]


def test_a_job_that_is_being_deleted_is_not_joined(kube_server: KubeServer, namespace: str) -> None:
    target = _target(kube_server, namespace)
    name = target.submit(_probe("leaving", 1, 0, 0), lambda _: None).id
    path = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs/{name}"
    kube_server.ask("PATCH", path, {"metadata": {"finalizers": ["ray.io/x"]}}, patch=True)
    kube_server.ask("DELETE", path)
    state = target.state(name)
    assert (state.phase, state.why, state.has_ended) == ("cancelled", "being deleted", True)
    gone = threading.Timer(
        3.0,
        lambda: kube_server.ask("PATCH", path, {"metadata": {"finalizers": None}}, patch=True),
    )
    gone.start()
    notes: list[str] = []
    started = target.submit(_probe("leaving", 1, 0, 0), notes.append)
    assert gone.finished.is_set()
    assert not started.already_running
    assert notes[0] == "waiting: for probe-leaving to be gone, which is being deleted"
    assert [state.id for state in target.list()] == [started.id]


def test_pods_that_still_write_are_waited_for(kube_server: KubeServer, namespace: str) -> None:
    """A RayJob is gone before its pods, which are given time for a checkpoint."""
    labels = {"pneumo/submission": "probe-writing"}
    spec = {"nodeName": "node-1", "containers": [{"name": "ray-head", "image": "x"}]}
    metadata = {"name": "head", "labels": labels}
    kube_server.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, namespace
    )
    pod = f"/api/v1/namespaces/{namespace}/pods/head"
    kube_server.ask("DELETE", f"{pod}?gracePeriodSeconds=60")  # no kubelet ends it
    end = threading.Timer(2.5, lambda: kube_server.ask("DELETE", f"{pod}?gracePeriodSeconds=0"))
    end.start()
    notes: list[str] = []
    _target(kube_server, namespace).submit(_probe("writing", 1, 0, 0), notes.append)
    assert end.finished.is_set()
    assert notes[0] == "waiting: for head to be gone, which is being deleted"


@pytest.mark.parametrize(
    "rule",
    [
        Rule("POST", "rayjobs", "drop after"),
        Rule("POST", "rayjobs", "drop before"),
        Rule("POST", "rayjobs", "answer", 429, times=2, retry_after="1"),
        Rule("POST", "rayjobs", "answer", 500),
        Rule("POST", "rayjobs", "answer", 503),
        Rule("GET", "rayjobs", "answer", 429, times=2),
        Rule("GET", "rayjobs", "drop before", times=2),
        Rule("POST", "selfsubjectaccessreviews", "answer", 500, times=2),
    ],
    ids=lambda rule: f"{rule.fault}-{rule.status}-{rule.method}-{rule.part}",
)
def test_what_passes_is_waited_for_and_the_job_is_created_once(
    kube_server: KubeServer, namespace: str, rule: Rule
) -> None:
    with FaultyProxy(kube_server.url, [replace(rule)]) as proxy:
        target = _target(kube_server, namespace, url=proxy.url)
        started = target.submit(_probe("once", 1, 0, 0), lambda _: None)
        assert started == kubernetes_jobs.Started("probe-once", already_running=False)
        assert len(proxy.injected) == rule.times
    jobs = kube_server.ask("GET", f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs")["items"]
    assert [job["metadata"]["name"] for job in jobs] == ["probe-once"]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (Rule("GET", "rayjobs", "answer", 401, times=9), AccessError, r"does not know you.*401"),
        (Rule("POST", "rayjobs", "answer", 403), AccessError, r"forbidden \(HTTP 403\): injected"),
        (Rule("POST", "rayjobs", "answer", 422), ConfigError, r"refused \(HTTP 422\): injected"),
        (
            Rule("GET", "rayjobs", "answer", 500, times=99),
            kubernetes_api.OutOfReachError,
            r"API server answers HTTP 500: injected 500",
        ),
        (
            Rule("GET", "rayjobs", "drop before", times=99),
            kubernetes_api.OutOfReachError,
            r"no answer from the API server \(the connection broke\)",
        ),
    ],
    ids=["401", "403", "422", "500", "dropped"],
)
def test_what_does_not_pass_is_one_line(
    kube_server: KubeServer, namespace: str, rule: Rule, error: type[Exception], message: str
) -> None:
    with FaultyProxy(kube_server.url, [replace(rule)]) as proxy:
        target = _target(kube_server, namespace, url=proxy.url)
        with pytest.raises(error, match=message) as raised:
            target.submit(_probe("refused", 1, 0, 0), lambda _: None)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_log_that_breaks_and_watches_that_expire_lose_and_repeat_nothing(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    rules = [
        Rule("GET", "watch=true", "answer", 410, times=2),
        Rule("GET", "watch=true", "cut", after_bytes=30),
        Rule("GET", "/log?", "drop before"),
        Rule("GET", "/log?", "cut", after_bytes=333, times=3),
        Rule("GET", "/log?", "answer", 500),
        Rule("GET", "/pods?", "answer", 500, times=2),
        Rule("GET", "/events?", "drop after", times=2),
    ]
    with FaultyProxy(kube_server.url, rules) as proxy:
        target = _target(kube_server, namespace, url=proxy.url)
        started = target.submit(_probe(f"breaks-{namespace}", 80, 0.1, 3), lambda _: None)
        numbers, _, code = _follow(target, started.id)
        broken = {(rule.part, rule.fault) for rule in proxy.injected}
    assert numbers == list(range(80))
    assert code == 1
    assert broken >= {("/log?", "cut"), ("/pods?", "answer"), ("/events?", "drop after")}
    assert ("watch=true", "answer") in broken


@pytest.mark.parametrize("hours", [0, 2, -7])
def test_a_nodes_zone_costs_no_line(
    kube_server: KubeServer, kubelet: Kubelet, namespace: str, hours: int
) -> None:
    """A log that is taken up again is asked for from a time on, which the API reads as UTC."""
    pod = f"zone-{hours + 12}"
    kubelet.zone_of[pod] = timezone(timedelta(hours=hours))
    container = {"name": "ray-job-submitter", "image": "x"}
    spec = {"nodeName": "node-1", "containers": [container]}
    kube_server.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod}, "spec": spec}, namespace
    )
    api = _target(kube_server, namespace).api
    written: list[str] = []
    cursor = LogCursor(written.append)
    for number in range(6):
        kubelet.write(pod, f"line {number}")
        cursor.read(api, pod, follow=False, limit_s=5.0)
    assert written == [f"line {number}\n" for number in range(6)]


def test_the_kubelets_own_words_do_not_end_a_log() -> None:
    written: list[str] = []
    cursor = LogCursor(written.append)
    repeated = 0
    for line in (
        "2026-01-02T03:04:05.1+02:00 one",
        "unable to retrieve container logs for containerd://0",
        "unable to retrieve container logs for containerd://0",
        "2026-01-02T01:04:05.100000001Z two",
        "2026-01-01T18:34:06-06:30 three",
    ):
        repeated = cursor._take(line, repeated)
    assert "".join(written).splitlines() == [
        "one",
        "unable to retrieve container logs for containerd://0",
        "two",
        "three",
    ]


def test_a_server_that_goes_away_ends_the_following_not_the_job(
    kube_server: KubeServer, namespace: str
) -> None:
    with FaultyProxy(kube_server.url) as proxy:
        target = replace(_target(kube_server, namespace, url=proxy.url), patience_s=1.0)
        target = replace(target, api=replace(target.api, patience_s=0.5))
        started = target.submit(_probe("away", 1, 0, 0), lambda _: None)
        threading.Timer(
            1.0, lambda: proxy.rules.append(Rule("GET", "", "drop before", times=999))
        ).start()
        notes: list[str] = []
        with pytest.raises(kubernetes_api.OutOfReachError, match="no answer"):
            target.follow(started.id, lambda _: None, lambda note: notes.append(str(note)))
    assert "the job goes on, trying again" in notes[-1]
    assert [state.id for state in _target(kube_server, namespace).list()] == ["probe-away"]


# --- who may --------------------------------------------------------------------------------------


def test_our_role_suffices_and_grants_nothing_more(
    kube_server: KubeServer, namespace: str, operator: Operator
) -> None:
    target = _target(kube_server, namespace)
    started = target.submit(_probe(f"role-{namespace}", 5, 0.1, 0), lambda _: None)
    assert _follow(target, started.id)[2] == 0
    target.list(), target.state(started.id), target.logs(started.id), target.cancel(started.id)
    role = yaml.safe_load((CHECKOUT / "k8s" / "rbac" / "role.yaml").read_text())
    granted = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {need for need in kube_server.asked(SUBMITTER) if need[1] != "selfsubjectaccessreviews"}
    assert asked == granted
    assert set(kubernetes_api.NEEDS) == granted


def test_a_person_without_rights_hears_which_before_anything_is_made(
    kube_server: KubeServer, namespace: str
) -> None:
    stranger = _target(kube_server, namespace, user=STRANGER)
    with pytest.raises(AccessError) as raised:
        stranger.submit(_probe("stranger", 1, 0, 0), lambda _: None)
    assert "no right to create rayjobs, get rayjobs, list rayjobs" in str(raised.value)
    assert f"in namespace {namespace}; ask its administrator" in str(raised.value)
    with pytest.raises(AccessError, match=f"no right to list rayjobs in namespace {namespace}"):
        stranger.list()
    for verb, path, body in (
        ("GET", f"/api/v1/namespaces/{namespace}/secrets", None),
        ("DELETE", f"/api/v1/namespaces/{namespace}/pods/x", None),
        ("GET", "/apis/ray.io/v1/namespaces/default/rayjobs", None),
        ("POST", f"/api/v1/namespaces/{namespace}/pods", {"kind": "Pod", "apiVersion": "v1"}),
    ):
        with pytest.raises(Exception, match="403"):
            kube_server.ask(verb, path, body, user=SUBMITTER)


# --- the user's mistakes, before any wait ---------------------------------------------------------


def test_a_cluster_without_kuberay(kube_server: KubeServer, namespace: str) -> None:
    with FaultyProxy(kube_server.url, rewrite=("/apis/ray.io/", "/apis/nobody.io/")) as proxy:
        admin = _target(kube_server, namespace, user="admin", url=proxy.url)
        with pytest.raises(ConfigError, match=r"has no RayJob kind \(ray\.io/v1\).*KubeRay oper"):
            admin.submit(_probe("absent", 1, 0, 0), lambda _: None)


def _overlay(folder: Path, *patch: dict[str, object], base: str = "overlays/kind-cpu") -> Path:
    """An overlay of one's own, which changes its RayJob by `patch`."""
    resources = [os.path.relpath(CHECKOUT / "k8s" / base, folder)]
    patches = [{"target": {"kind": "RayJob"}, "patch": yaml.safe_dump(list(patch))}]
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": resources, "patches": patches})
    )
    return folder


def _put(path: str, value: object) -> dict[str, object]:
    return {"op": "add", "path": path, "value": value}


CLUSTER = "/spec/rayClusterSpec"
WORKERS = f"{CLUSTER}/workerGroupSpecs/0/template/spec"


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (_put(f"{CLUSTER}/authOptions/mode", "tokens"), r'Unsupported value: "tokens"'),
        (_put("/spec/backofLimit", 1), r"knows no field spec\.backofLimit; correct the over"),
        (
            _put(f"{WORKERS}/containers/0/imagePullPolciy", "Always"),
            r"knows no field spec\.rayClusterSpec\.workerGroupSpecs\[0\]\.template\.spec\."
            r"containers\[0\]\.imagePullPolciy",
        ),
        ({"op": "remove", "path": CLUSTER}, r"the overlay's RayJob has no rayClusterSpec"),
        (
            _put("/spec/clusterSelector", {"ray.io/cluster": "there"}),
            r"or a clusterSelector besides: .*takes jobs by --address",
        ),
        (_put(f"{WORKERS}/containers", []), r"overlay's workers: template\.spec has no containers"),
        (_put("/spec/submissionMode", "K8sJobmode"), r"the RayJob: submissionMode 'K8sJobmode'"),
    ],
    ids=["enum", "field", "field of a pod", "no cluster", "selector", "no containers", "mode"],
)
def test_a_wrong_overlay_is_one_line_and_makes_nothing(
    kube_server: KubeServer,
    namespace: str,
    tmp_path: Path,
    patch: dict[str, object],
    message: str,
) -> None:
    target = replace(_target(kube_server, namespace), overlay=_overlay(tmp_path, patch))
    with pytest.raises(ConfigError, match=message) as raised:
        target.submit(_probe("invalid", 1, 0, 0), lambda _: None)
    assert "\n" not in str(raised.value)
    assert target.list() == []


def test_a_new_server_is_asked_to_be_strict(kube_server: KubeServer, namespace: str) -> None:
    rule = Rule("POST", "rayjobs?fieldValidation=Strict", "answer", 400)
    with FaultyProxy(kube_server.url, [rule]) as proxy:
        target = _target(kube_server, namespace, url=proxy.url)
        with pytest.raises(ConfigError, match=r"refused \(HTTP 400\): injected 400"):
            target.submit(_probe("strict", 1, 0, 0), lambda _: None)


def test_workers_without_limits_are_taken(
    kube_server: KubeServer, namespace: str, tmp_path: Path
) -> None:
    overlay = _overlay(tmp_path, {"op": "remove", "path": f"{WORKERS}/containers/0/resources"})
    notes: list[str] = []
    target = replace(_target(kube_server, namespace), overlay=overlay)
    target.submit(_probe("limitless", 1, 0, 0), notes.append)
    assert "1 workers of no limits; image pneumo:dev" in notes[0]


def test_a_namespace_that_is_not_there(kube_server: KubeServer) -> None:
    target = _target(kube_server, "nowhere", user="admin")
    with pytest.raises(ConfigError, match=r"no namespace 'nowhere'; give --namespace"):
        target.submit(_probe("nowhere", 1, 0, 0), lambda _: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--overlay is required with --target k8s; give one of cpu, gpu-onde"),
        ("--overlay gpu-spott", "no overlay 'gpu-spott'; give one of cpu, gpu-ondemand, gpu-spot"),
        ("--overlay kind-cpu --context nobody", "no context 'nobody' in the kubeconfig; has: tes"),
        ("--overlay kind-cpu --workers 0", "--workers 0: at least 1"),
    ],
)
def test_a_wrong_flag_is_one_line(
    kube_server: KubeServer, namespace: str, flags: str, message: str
) -> None:
    done = _command(
        kube_server,
        namespace,
        *("submit", *shlex.split(flags), "train"),
        *("--store", "s3://b/s", "--run", "s3://b/r"),
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert message in line


PLUGIN = """
apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users:
- name: u
  user:
    exec: {apiVersion: client.authentication.k8s.io/v1, command: no-such-plugin}
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "kubernetes: no usable kubeconfig ("),
        ("", "kubernetes: no usable kubeconfig ("),
        ("a: b: c\n", "none, line 1: mapping values are not allowed here); set KUBECONFIG"),
        ("just words\n", "kubernetes: no usable kubeconfig ("),
        ("[1, 2]\n", "kubernetes: no usable kubeconfig ("),
        (PLUGIN, "context c: its log-in gives no credentials ("),
    ],
    ids=["absent", "empty", "no YAML", "words", "list", "no plugin"],
)
def test_a_kubeconfig_that_does_not_do_is_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "none"
    if content is not None:
        path.write_text(content)
    own = {k: v for k, v in os.environ.items() if not k.startswith("KUBERNETES_")}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "list", "--target", "k8s"],
        env=own | {"KUBECONFIG": str(path), "HOME": str(tmp_path)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: kubernetes: ")
    assert message in line


def test_the_way_back_from_a_pod_names_no_context() -> None:
    api = kubernetes_api.Api(None, "team", "")
    assert KubernetesTarget(api).flags == "--target k8s --namespace team"
    assert api.place == "this pod's cluster"


def test_nobody_answers() -> None:
    settings = kubernetes_api.kubernetes_client.Configuration()
    settings.host, settings.retries = "https://127.0.0.1:1", False
    client = kubernetes_api.kubernetes_client.ApiClient(settings)
    api = kubernetes_api.Api(client, "default", "nowhere", patience_s=0.1)
    start_s = time.monotonic()
    with pytest.raises(kubernetes_api.OutOfReachError, match=r"\(connection refused\)"):
        KubernetesTarget(api).list()
    assert time.monotonic() - start_s < 5


def test_all_warnings_are_seen_and_evictions_by_taint(
    kube_server: KubeServer, namespace: str
) -> None:
    def event(number: int, kind: str, reason: str) -> None:
        kube_server.apply(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"e{number}"},
                "involvedObject": {"kind": "Pod", "name": f"p{number}", "namespace": namespace},
                "reason": reason,
                "type": kind,
            },
            namespace,
        )

    for number in range(505):
        event(number, "Warning", "FailedMount")
    event(900, "Normal", "TaintManagerEviction")
    event(901, "Normal", "Scheduled")
    seen = [each["reason"] for each in _target(kube_server, namespace).api.list_warnings()]
    assert seen == ["FailedMount"] * 505 + ["TaintManagerEviction"]


def test_a_job_that_nobody_knows(kube_server: KubeServer, namespace: str) -> None:
    target = _target(kube_server, namespace)
    for ask in (target.state, target.logs):
        with pytest.raises(ConfigError, match="no RayJob 'nobody' in namespace"):
            ask("nobody")
    with pytest.raises(ConfigError, match="no RayJob 'nobody'"):
        target.follow("nobody", lambda _: None, lambda _: None)
