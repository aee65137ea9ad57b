"""Addresses, tokens and versions of a dashboard."""

from __future__ import annotations

import json
import os
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from packaging.specifiers import SpecifierSet

from cluster.ray import jobs
from cluster.ray.client import Client, connect, sends_token_openly
from cluster.targets import OutOfReachError
from pneumo.errors import AccessError, ConfigError
from tests import CHECKOUT
from tests.cluster.http_proxy import FaultyProxy, Rule

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster
from tests.cluster.ray.probes import make_probe


def test_a_dashboard_that_is_busy_is_no_wrong_address(ray_cluster: RayCluster) -> None:
    rule = Rule("GET", "/api/version", "answer", 503)
    with (
        FaultyProxy(ray_cluster.address, [rule]) as proxy,
        pytest.raises(OutOfReachError, match="answers HTTP 503"),
    ):
        connect(proxy.url, ray_cluster.environ)


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://head.example.org:8265", True),
        ("https://head.example.org", False),
        ("http://127.0.0.1:8265", False),
    ],
)
def test_secrets_on_an_open_wire_are_warned_of(address: str, *, warned: bool) -> None:
    """Before anything is sent; the cluster that is asked then is of another version."""
    notes: list[str] = []
    asked = make_probe("open", 1, 0, 0, AWS_SECRET_ACCESS_KEY="hidden", AWS_REGION="eu-north-1")
    with _Dashboard("2.51.0", "3.11.7") as dashboard:
        client = connect(dashboard.address, {"RAY_AUTH_MODE": "disabled"})
        with pytest.raises(ConfigError, match=r"runs Ray 2\.51"):
            jobs.RayTarget(address, client).submit(asked, notes.append)
    told = f"warning: AWS_SECRET_ACCESS_KEY will go to {address} unencrypted; "
    assert [note.startswith(told) for note in notes] == [True] * warned
    assert "hidden" not in "".join(notes)


def test_versions_agree_with_a_real_cluster(client: Client) -> None:
    jobs.check_versions(client)


@pytest.mark.parametrize(
    ("ray_version", "python_version", "message"),
    [
        ("2.51.0", "3.11.7", r"runs Ray 2\.51\.0, this checkout is for 2\."),
        (version("ray"), "3.10.2", r"runs Python 3\.10\.2, this checkout is for 3\.11 and 3\.12"),
        (version("ray"), "3.13.0", r"runs Python 3\.13\.0"),
    ],
)
def test_a_cluster_of_other_versions_is_refused(
    ray_version: str, python_version: str, message: str
) -> None:
    with _Dashboard(ray_version, python_version) as dashboard:
        client = connect(dashboard.address, {"RAY_AUTH_MODE": "disabled"})
        with pytest.raises(ConfigError, match=message):
            jobs.check_versions(client)


def test_the_pythons_are_those_of_the_project() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    allowed = SpecifierSet(project["requires-python"])
    assert [f"3.{n}" for n in range(8, 20) if f"3.{n}.0" in allowed] == list(jobs.PYTHONS)


def test_the_given_address_wins_over_the_environment(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    jobs.list_jobs(connect(ray_cluster.address, ray_cluster.environ))
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_a_wrong_token_and_an_unknown_job(client: Client, ray_cluster: RayCluster) -> None:
    with pytest.raises(AccessError, match="refuses the token; set RAY_AUTH_TOKEN"):
        jobs.list_jobs(connect(ray_cluster.address, {"RAY_AUTH_TOKEN": "x" * 32}))
    for ask in (Client.details, Client.log_text, jobs.cancel):
        with pytest.raises(ConfigError, match=r"no job 'nobody'.*cluster list shows"):
            ask(client, "nobody")


class _Dashboard:
    """Answers as a Ray dashboard of other versions would, as far as versions go."""

    def __init__(self, ray_version: str, python_version: str) -> None:
        answers = {
            "/api/version": {"version": "4", "ray_version": ray_version, "ray_commit": "x"},
            "/api/v0/cluster_metadata": {
                "result": True,
                "data": {"rayVersion": ray_version, "pythonVersion": python_version},
            },
        }

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = json.dumps(answers[self.path]).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> _Dashboard:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize(
    ("address", "openly"),
    [
        ("http://head.example.org:8265", True),
        ("https://head.example.org", False),
        ("http://127.0.0.1:8265", False),
    ],
)
def test_a_token_that_others_could_read_is_told(address: str, *, openly: bool) -> None:
    assert sends_token_openly(address, {"RAY_AUTH_TOKEN": "secret"}) is openly
    assert not sends_token_openly(address, {"RAY_AUTH_MODE": "disabled"})
