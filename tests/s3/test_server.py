"""The S3 server of the tests starts whatever happens beside it."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3.server import CephServer, free_ports

pytestmark = pytest.mark.s3


@contextlib.contextmanager
def beside(server: CephServer) -> Iterator[CephServer]:
    """Another server, not started, beside the one of the session, which says that Ceph is here."""
    yield server
    server.stop()


@pytest.mark.parametrize("taken", [0, 1], ids=["gateway", "monitor"])
def test_a_port_that_another_process_took_is_replaced(
    taken: int, ceph: CephServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.ExitStack() as others:
        lost: list[int] = []

        def choose_and_lose(number: int) -> list[int]:
            ports = free_ports(number)
            if not lost:
                others.enter_context(socket.create_server(("127.0.0.1", ports[taken])))
                lost.append(ports[taken])
            return ports

        second = CephServer(tmp_path, choose_ports=choose_and_lose)
        others.enter_context(beside(second))
        second.start()
        assert second.answers()
    said = capfd.readouterr().err
    assert f"start 1 of 3 of the S3 server: {('gateway', 'mon')[taken]} did not start" in said


class Doomed(CephServer):
    """Its daemons are killed as soon as they have started."""

    def spawn(self, name: str, *command: str) -> int:
        pid = super().spawn(name, *command)
        os.kill(pid, signal.SIGKILL)
        return pid


def test_a_server_that_never_starts_says_why(ceph: CephServer, tmp_path: Path) -> None:
    with (
        beside(Doomed(tmp_path)) as second,
        pytest.raises(RuntimeError, match="start 3 of 3 of the S3 server: mon did not start"),
    ):
        second.start()
