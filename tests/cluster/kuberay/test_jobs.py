"""The Kubernetes target, as far as it needs no cluster; tests/kubernetes has the rest."""

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client as kubernetes_client

from cluster.kuberay import api as kubernetes_api
from cluster.kuberay.jobs import KubernetesTarget
from cluster.kuberay.kept_logs import DriverLog, LogCursor
from cluster.targets import OutOfReachError
from pneumo import storage
from tests import CHECKOUT


class OneLog:
    """An API server that knows one log, which has ended."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def stream_log(self, pod: str, container: str, **options: Any) -> Generator[str, None, None]:
        yield from self.lines


def test_the_kubelets_own_words_do_not_end_a_log() -> None:
    written: list[str] = []
    cursor = LogCursor(DriverLog(written.append, lambda _: None))
    api: Any = OneLog(
        "2026-01-02T03:04:05.1+02:00 one",
        "unable to retrieve container logs for containerd://0",
        "unable to retrieve container logs for containerd://0",
        "2026-01-02T01:04:05.100000001Z two",
        "2026-01-01T18:34:06-06:30 three",
    )
    assert cursor.read(api, "pod", follow=False, limit_s=60.0) == "ended"
    cursor.log.flush()
    assert "".join(written).splitlines() == [
        "one",
        "unable to retrieve container logs for containerd://0",
        "two",
        "three",
    ]


_CONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
"""
_PLUGIN = f"""{_CONFIG}
current-context: c
users:
- name: u
  user:
    exec: {{apiVersion: client.authentication.k8s.io/v1, command: no-such-plugin}}
"""
_NO_ANSWER = "no answer from the API server (connection refused); is the cluster up"
_GONE = f"{_CONFIG}\ncurrent-context: c\nusers: [{{name: u, user: {{token: x}}}}]\n"


@pytest.mark.parametrize(
    ("content", "exit_code", "message"),
    [
        (None, 2, "kubernetes: no usable kubeconfig ("),
        ("", 2, "kubernetes: no usable kubeconfig ("),
        ("a: b: c\n", 2, "none, line 1: mapping values are not allowed here); set KUBECONFIG"),
        ("just words\n", 2, "kubernetes: no usable kubeconfig ("),
        ("[1, 2]\n", 2, "kubernetes: no usable kubeconfig ("),
        (_PLUGIN, 2, "context c: its log-in gives no credentials ("),
        (_CONFIG, 2, "the kubeconfig has no current context; set one: kubectl config use-context"),
        pytest.param(_GONE, 1, f"context c: {_NO_ANSWER}", marks=pytest.mark.slow),  # after 20 s
    ],
    ids=["absent", "empty", "no YAML", "words", "list", "no plugin", "no context", "gone"],
)
def test_a_kubeconfig_that_does_not_do_is_one_line(
    tmp_path: Path, content: str | None, exit_code: int, message: str
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
    assert done.returncode == exit_code, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: kubernetes: ")
    assert message in line


def test_an_api_server_that_is_gone_is_told_after_some_patience() -> None:
    settings = kubernetes_client.Configuration(host="https://127.0.0.1:1")
    settings.retries = False
    client = kubernetes_client.ApiClient(settings)
    api = kubernetes_api.Api(client, "team", "c", retry_timeout_s=0.6)
    with pytest.raises(OutOfReachError) as raised:
        api.list_rayjobs("")
    assert f"kubernetes: context c: {_NO_ANSWER}" in str(raised.value)


def test_the_log_of_a_deleted_run_is_found_as_its_folder_is_typed() -> None:
    class Server:
        namespace, place = "team", "context c"

        def get_rayjob(self, name: str) -> Any:
            raise kubernetes_api.MissingError(name)

    storage.write_text("memory://bucket/runs/1/logs/train-1/20260102-030405.log", "epoch 1\n")
    api: Any = Server()
    for typed in ("memory://bucket/runs/1", "memory://bucket/runs/1/"):
        assert KubernetesTarget(api, run_url=typed).logs("train-1").endswith("epoch 1\n")


def test_the_way_back_from_a_pod_names_no_context() -> None:
    api = kubernetes_api.Api(None, "team", "")
    assert KubernetesTarget(api).flags == "--target k8s --namespace team"
    assert api.place == "this pod's cluster"
