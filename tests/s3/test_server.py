"""The S3 server of the tests starts even when another process takes its port."""

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
def stopped_at_end(server: CephServer) -> Iterator[CephServer]:
    """Stop the server at the end; it is another than the session's."""
    yield server
    server.stop()


@pytest.mark.parametrize("taken", [0, 1], ids=["gateway", "monitor"])
def test_it_starts_on_another_port_when_a_process_took_the_first(
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
        others.enter_context(stopped_at_end(second))
        second.start()
        assert second.answers()
    said = capfd.readouterr().err
    assert f"start 1 of 3 of the S3 server: {('gateway', 'mon')[taken]} did not start" in said


class CrashingServer(CephServer):
    """Its daemons are killed as soon as they have started."""

    def spawn(self, name: str, *command: str) -> int:
        pid = super().spawn(name, *command)
        os.kill(pid, signal.SIGKILL)
        return pid


def test_a_server_that_cannot_start_raises_with_the_reason(
    ceph: CephServer, tmp_path: Path
) -> None:
    with (
        stopped_at_end(CrashingServer(tmp_path)) as second,
        pytest.raises(RuntimeError, match="start 3 of 3 of the S3 server: mon did not start"),
    ):
        second.start()
