"""The S3 server of the tests starts whatever happens beside it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3 import server
from tests.s3.server import CephServer

pytestmark = pytest.mark.s3


@pytest.fixture
def second(ceph: CephServer, tmp_path: Path) -> Iterator[CephServer]:
    """Another server, not started, beside the one of the session, which says that Ceph is here."""
    second = CephServer(tmp_path)
    yield second
    second.stop()


@pytest.mark.parametrize("taken", [0, 1], ids=["gateway", "monitor"])
def test_a_port_that_another_process_took_is_replaced(
    taken: int,
    second: CephServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    choose = server._free_ports
    with contextlib.ExitStack() as others:

        def choose_and_lose(number: int) -> list[int]:
            ports = choose(number)
            others.enter_context(socket.create_server(("127.0.0.1", ports[taken])))
            monkeypatch.setattr(server, "_free_ports", choose)
            return ports

        monkeypatch.setattr(server, "_free_ports", choose_and_lose)
        second.start()

    assert second._answers()
    said = capfd.readouterr().err
    assert f"start 1 of 3 of the S3 server: {('gateway', 'mon')[taken]} did not start" in said


def test_a_server_that_never_starts_says_why(
    second: CephServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = CephServer._spawn

    def spawn_and_kill(self: CephServer, name: str, *command: str) -> int:
        pid = spawn(self, name, *command)
        os.kill(pid, signal.SIGKILL)
        return pid

    monkeypatch.setattr(CephServer, "_spawn", spawn_and_kill)
    with pytest.raises(RuntimeError, match="start 3 of 3 of the S3 server: mon did not start"):
        second.start()
