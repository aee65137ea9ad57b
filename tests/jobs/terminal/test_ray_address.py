"""What a job says at once of a RAY_ADDRESS that leads nowhere."""

import socket
from contextlib import closing
from pathlib import Path

import pytest

from jobs.terminal.ray_address import check_ray_address
from pneumo.errors import ClusterError, ConfigError
from tests.jobs.terminal.test_entry_point import run_process


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_what_ray_finds_by_itself(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_ray_address()


@pytest.mark.parametrize("address", ["nonsense", "head:port", "head:99999", ":6379", "[::1:6379"])
def test_what_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        check_ray_address()


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "ray://head"])
def test_what_a_job_is_submitted_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=r"`python -m cluster submit"):
        check_ray_address()


def test_a_port_that_is_open_and_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        check_ray_address()
    with pytest.raises(ClusterError, match=rf"127\.0\.0\.1, port {port}: Connection refused"):
        check_ray_address()


def test_a_host_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(ClusterError, match=r"cannot connect to no-such-host\.invalid"):
        check_ray_address()


def test_a_job_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "studies.csv").write_text("file,patient,target\n")
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    done = run_process(
        "jobs.prepare", "--source", str(tmp_path), "--store", str(tmp_path / "store")
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: RAY_ADDRESS=")
