"""Before a run's pods exist: each run is created once, faults of the API server, user errors."""

import shlex
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from kubernetes.client.exceptions import ApiException

from cluster.kuberay.overlays import find_overlay
from cluster.targets import OutOfReachError, Started
from pneumo.errors import AccessError, ConfigError
from tests.cluster.http_proxy import FaultyProxy, Rule
from tests.kubernetes.cluster import Access, Document, KubeCluster, Team
from tests.kubernetes.conftest import NewTeam
from tests.kubernetes.namespaces import ROLE, STRANGER, forbid_pods, grant, make_token
from tests.kubernetes.probes import make_probe, put, write_overlay

pytestmark = pytest.mark.kubernetes

CLUSTER = "/spec/rayClusterSpec"
WORKERS = f"{CLUSTER}/workerGroupSpecs/0/template/spec"


def _url(team: Team) -> str:
    return str(team.cluster.server["server"])


# --- each run once --------------------------------------------------------------------------------


def test_submitting_twice_runs_once(idle_team: Team) -> None:
    target = idle_team.target()
    asked = make_probe(idle_team, "twice", 1, 0, 0)
    assert not target.submit(asked, lambda _: None).already_running
    assert target.submit(asked, lambda _: None).already_running
    other = make_probe(idle_team, "twice", 1, 0, 0, settings="b")
    with pytest.raises(ConfigError, match="is being written by probe-twice with other settings"):
        target.submit(other, lambda _: None)
    assert [state.id for state in target.list()] == ["probe-twice"]


def test_differences_to_the_running_job_are_shown(idle_team: Team) -> None:
    target = idle_team.target()
    asked = make_probe(idle_team, "joined", 1, 0, 0)
    target.submit(asked, lambda _: None)
    notes: list[str] = []
    other = replace(
        target, image="r.io/x@sha256:1", workers=3, overlay=find_overlay("gpu-ondemand")
    )
    assert other.submit(asked, notes.append).already_running
    assert notes == [
        "it keeps running with 1 worker pods, not 3",
        "it keeps running with image pneumo:dev, not r.io/x@sha256:1",
        "it keeps running with worker pods of 1 cpu, 3Gi memory, not of 4 cpu, 21Gi "
        "ephemeral-storage, 16Gi memory, 1 nvidia.com/gpu",
    ]


def test_a_job_that_is_being_deleted_is_not_joined(idle_team: Team) -> None:
    team, target = idle_team, idle_team.target()
    asked = make_probe(team, "leaving", 1, 0, 0)
    name = target.submit(asked, lambda _: None).id
    path = f"{team.path('ray.io/v1', 'rayjobs')}/{name}"
    hold = [put("/metadata/finalizers", ["tests.example/hold"])]
    team.cluster.ask("PATCH", path, hold, patch="json")
    team.cluster.ask("DELETE", path)
    state = target.state(name)
    assert (state.phase, state.why, state.has_ended) == ("cancelled", "being deleted", True)
    let_go = {"metadata": {"finalizers": None}}
    gone = threading.Timer(3.0, lambda: team.cluster.ask("PATCH", path, let_go))
    gone.start()
    notes: list[str] = []
    started = target.submit(asked, notes.append)
    assert gone.finished.is_set()
    assert not started.already_running
    assert notes[0] == "waiting: for probe-leaving to be gone, which is being deleted"
    assert [state.id for state in target.list()] == [started.id]


def test_submitting_waits_for_pods_that_still_write(team: Team) -> None:
    """A RayJob is deleted before its pods, which have time for a checkpoint."""
    target = team.target()
    asked = make_probe(team, "writing", 1, 0, 0)
    team.cluster.create(_slow_ending_pod("head", asked.id), team.namespace)
    team.wait("the pod to run", lambda: team.pods()[0]["status"]["phase"] == "Running")
    forbid_pods(team.cluster, team.namespace)
    team.delete_pod("head")
    notes: list[str] = []
    target.submit(asked, notes.append)
    assert notes[0] == "waiting: for head to be gone, which is being deleted"
    assert team.pods() == []


def _slow_ending_pod(name: str, submission_id: str) -> Document:
    """A pod that ends some seconds after SIGTERM."""
    secure = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    command = ["sh", "-c", "trap 'sleep 4; exit' TERM; while :; do sleep 1; done"]
    container = {
        "name": "ray-head", "image": "pneumo:dev", "command": command, "securityContext": secure,
    }  # fmt: skip
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"pneumo/submission": submission_id}},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 20},
    }


def test_control_c_twice_cancels_a_waiting_run(idle_team: Team) -> None:
    target = idle_team.target()
    started = target.submit(make_probe(idle_team, "interrupt", 9, 0, 0), lambda _: None)
    with idle_team.begin("logs", started.id, "--follow") as following:
        try:
            assert following.stderr is not None
            for awaited in ("waiting: ", "Ctrl-C again"):
                while awaited not in (line := following.stderr.readline()):
                    assert line, f"its output ended without: {awaited}"
                following.send_signal(signal.SIGINT)
            _, error = following.communicate(timeout=60)
        finally:
            following.kill()
    assert following.returncode == 130
    assert f"{started.id} cancelled" in error
    assert target.list() == []


# --- faults of the API server ----------------------------------------------


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
def test_transient_faults_are_tried_again_and_the_job_is_created_once(
    idle_team: Team, rule: Rule
) -> None:
    with FaultyProxy(_url(idle_team), [replace(rule)]) as proxy:
        target = idle_team.target(url=proxy.url)
        started = target.submit(make_probe(idle_team, "once", 1, 0, 0), lambda _: None)
        assert started == Started("probe-once", already_running=False)
        assert len(proxy.injected) == rule.times
    jobs = idle_team.cluster.ask("GET", idle_team.path("ray.io/v1", "rayjobs"))["items"]
    assert [job["metadata"]["name"] for job in jobs] == ["probe-once"]


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (Rule("GET", "rayjobs", "answer", 401, times=9), AccessError, r"does not know you.*401"),
        (Rule("POST", "rayjobs", "answer", 403), AccessError, r"forbidden \(HTTP 403\): injected"),
        (Rule("POST", "rayjobs", "answer", 422), ConfigError, r"refused \(HTTP 422\): injected"),
        (
            Rule("GET", "rayjobs", "answer", 500, times=99),
            OutOfReachError,
            r"API server answers HTTP 500: injected 500",
        ),
        (
            Rule("GET", "rayjobs", "drop before", times=99),
            OutOfReachError,
            r"no answer from the API server \(the connection broke\)",
        ),
    ],
    ids=["401", "403", "422", "500", "dropped"],
)
def test_a_permanent_fault_is_reported_in_one_line(
    idle_team: Team, rule: Rule, error: type[Exception], message: str
) -> None:
    with FaultyProxy(_url(idle_team), [replace(rule)]) as proxy:
        target = idle_team.target(url=proxy.url)
        with pytest.raises(error, match=message) as raised:
            target.submit(make_probe(idle_team, "refused", 1, 0, 0), lambda _: None)
    assert "\n" not in str(raised.value)


def test_an_unreachable_server_ends_following_but_not_the_job(idle_team: Team) -> None:
    with FaultyProxy(_url(idle_team)) as proxy:
        target = replace(idle_team.target(url=proxy.url, retry_timeout_s=0.5), retry_timeout_s=1.0)
        started = target.submit(make_probe(idle_team, "away", 1, 0, 0), lambda _: None)
        notes: list[str] = []

        def note(text: object) -> None:
            notes.append(str(text))
            if not proxy.rules:  # after the first note
                proxy.rules.append(Rule("GET", "", "drop before", times=999))

        with pytest.raises(OutOfReachError, match="no answer"):
            target.follow(started.id, lambda _: None, note)
    assert "the job goes on, trying again" in notes[-1]
    assert [state.id for state in idle_team.target().list()] == ["probe-away"]


def test_a_token_that_is_no_longer_valid(idle_team: Team) -> None:
    target = idle_team.target()
    account = f"{idle_team.path('v1', 'serviceaccounts')}/submitter"
    idle_team.cluster.ask("DELETE", account)  # ends the token, as its expiry would
    with pytest.raises(
        AccessError, match=r"the cluster does not know you \(HTTP 401\).*log in again"
    ):
        idle_team.wait("the token to end", lambda: target.list() and None, within_s=60)


def test_a_client_certificate_that_has_expired(idle_team: Team, tmp_path: Path) -> None:
    """Servers without an authority for client certificates treat the user as anonymous."""
    key, asked, signed = (str(tmp_path / name) for name in ("key", "asked", "signed"))
    new = ("-newkey", "rsa:2048", "-nodes", "-subj", "/CN=someone", "-keyout", key, "-out", asked)
    for words in (
        ("req", *new),
        ("x509", "-req", "-in", asked, "-signkey", key, "-days", "0", "-out", signed),
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    path = idle_team.user.kubeconfig
    config = yaml.safe_load(path.read_text())
    config["users"][0]["user"] = {"client-certificate": signed, "client-key": key}
    path.write_text(yaml.safe_dump(config))
    done = idle_team.command("list")
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert "the cluster does not know you (HTTP 40" in line
    assert "client certificate of the kubeconfig has expired" in line


# --- rights --------------------------------------------------------------------------------------


def test_missing_rights_are_listed_before_anything_is_created(
    kube: KubeCluster, idle_team: Team
) -> None:
    name = idle_team.namespace
    token = make_token(kube, name, STRANGER)
    config = kube.write_kubeconfig(idle_team.folder / "stranger", token, name)
    stranger = replace(idle_team, user=Access(config)).target()
    with pytest.raises(AccessError) as raised:
        stranger.submit(make_probe(idle_team, "stranger", 1, 0, 0), lambda _: None)
    assert "no right to create rayjobs, get rayjobs, list rayjobs" in str(raised.value)
    assert f"in namespace {name}; ask its administrator" in str(raised.value)
    with pytest.raises(AccessError, match=f"no right to list rayjobs in namespace {name}"):
        stranger.list()


def test_the_role_grants_nothing_more(idle_team: Team) -> None:
    pods = idle_team.path("v1", "pods")
    for verb, path, body in (
        ("GET", idle_team.path("v1", "secrets"), None),
        ("DELETE", f"{pods}/x", None),
        ("GET", "/apis/ray.io/v1/namespaces/default/rayjobs", None),
        ("POST", pods, {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "x"}}),
    ):
        with pytest.raises(ApiException, match="403"):
            idle_team.user.ask(verb, path, body)


# --- user errors, reported at once ---------------------------------------------------------


def test_a_cluster_without_kuberay(kube: KubeCluster, idle_team: Team) -> None:
    rule = {"apiGroups": ["nobody.io"], "resources": ["rayjobs"], "verbs": ["*"]}
    grant(kube, idle_team.namespace, {**ROLE, "metadata": {"name": "nobody"}, "rules": [rule]})
    with FaultyProxy(_url(idle_team), rewrite=("/apis/ray.io/", "/apis/nobody.io/")) as proxy:
        target = idle_team.target(url=proxy.url)
        with pytest.raises(ConfigError, match=r"has no RayJob kind \(ray\.io/v1\).*KubeRay oper"):
            target.submit(make_probe(idle_team, "absent", 1, 0, 0), lambda _: None)


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (put(f"{CLUSTER}/authOptions/mode", "tokens"), r'Unsupported value: "tokens"'),
        (put("/spec/backofLimit", 1), r"knows no field spec\.backofLimit; correct the over"),
        (
            put(f"{WORKERS}/containers/0/imagePullPolciy", "Always"),
            r"knows no field spec\.rayClusterSpec\.workerGroupSpecs\[0\]\.template\.spec\."
            r"containers\[0\]\.imagePullPolciy",
        ),
        ({"op": "remove", "path": CLUSTER}, r"the overlay's RayJob has no rayClusterSpec"),
        (
            put("/spec/clusterSelector", {"ray.io/cluster": "there"}),
            r"or a clusterSelector besides: .*for an existing Ray cluster use --address",
        ),
        (put(f"{WORKERS}/containers", []), r"overlay's workers: template\.spec has no containers"),
        (put("/spec/submissionMode", "K8sJobmode"), r"the RayJob: submissionMode 'K8sJobmode'"),
    ],
    ids=["enum", "field", "field of a pod", "no cluster", "selector", "no containers", "mode"],
)
def test_a_wrong_overlay_is_reported_in_one_line_and_creates_nothing(
    idle_team: Team, tmp_path: Path, patch: Document, message: str
) -> None:
    target = idle_team.target(
        overlay=write_overlay(tmp_path / "mine", patch, base=idle_team.overlay)
    )
    with pytest.raises(ConfigError, match=message) as raised:
        target.submit(make_probe(idle_team, "invalid", 1, 0, 0), lambda _: None)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    assert target.list() == []


def test_workers_without_limits_are_accepted(idle_team: Team, tmp_path: Path) -> None:
    limits = {"op": "remove", "path": f"{WORKERS}/containers/0/resources"}
    target = idle_team.target(
        overlay=write_overlay(tmp_path / "mine", limits, base=idle_team.overlay)
    )
    notes: list[str] = []
    target.submit(make_probe(idle_team, "limitless", 1, 0, 0), notes.append)
    assert "1 workers of no limits; image pneumo:dev" in notes[0]


def test_a_namespace_that_does_not_exist(kube: KubeCluster, idle_team: Team) -> None:
    admin = replace(idle_team, user=kube, namespace="nowhere").target()
    with pytest.raises(ConfigError, match=r"no namespace 'nowhere'; give --namespace"):
        admin.submit(make_probe(idle_team, "nowhere", 1, 0, 0), lambda _: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--overlay gpu-spott", "no overlay 'gpu-spott'; give one of cpu, gpu-ondemand, gpu-spot"),
        ("--context nobody", "no context 'nobody' in the kubeconfig; has: tests"),
        ("--workers 0", "--workers 0: at least 1"),
    ],
)
def test_a_wrong_flag_is_reported_in_one_line(idle_team: Team, flags: str, message: str) -> None:
    done = idle_team.command(
        *("submit", *shlex.split(flags), "train"), *("--store", "s3://b/s", "--run", "s3://b/r")
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert message in line


def test_all_warnings_and_evictions_by_taint_are_listed(idle_team: Team) -> None:
    def create(number: int, kind: str, reason: str) -> None:
        about = {"kind": "Pod", "name": f"p{number}", "namespace": idle_team.namespace}
        event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": f"e{number:03}"}}
        details = {"involvedObject": about, "reason": reason, "type": kind}
        idle_team.cluster.create({**event, **details}, idle_team.namespace)

    for number in range(505):
        create(number, "Warning", "FailedMount")
    create(900, "Normal", "TaintManagerEviction")
    create(901, "Normal", "Scheduled")
    seen = [each["reason"] for each in idle_team.target().api.list_warnings()]
    assert seen == ["FailedMount"] * 505 + ["TaintManagerEviction"]


def test_a_job_that_does_not_exist(idle_team: Team) -> None:
    target = idle_team.target()
    for ask in (target.state, target.logs):
        with pytest.raises(ConfigError, match="no RayJob 'nobody' in namespace"):
            ask("nobody")
    with pytest.raises(ConfigError, match="no RayJob 'nobody'"):
        target.follow("nobody", lambda _: None, lambda _: None)


def test_two_namespaces_are_separate(new_team: NewTeam) -> None:
    one, other = new_team(), new_team()
    started = one.target().submit(make_probe(one, "alone", 1, 0, 0), lambda _: None)
    assert [state.id for state in one.target().list()] == [started.id]
    assert other.target().list() == []
