"""Following a job's log over connections that drop, and dashboards that are busy."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from cluster.ray import jobs
from cluster.ray.client import Client, connect
from cluster.ray.following import follow
from cluster.targets import LostError, OutOfReachError
from tests.cluster.http_proxy import FaultyProxy, Rule

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster
from tests.cluster.ray.probes import follow_to_end, make_probe, read_numbers, start


def test_a_dropped_stream_is_taken_up_where_it_stopped(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = start(client, make_probe("dropped", 40, 0.1, 0))
    with _Relay(ray_cluster.address) as relay:
        through = connect(relay.address, ray_cluster.environ)
        log: list[str] = []

        def write(part: str) -> None:
            log.append(part)
            if "line 5\n" in part:
                relay.cut()
                log.append("cut\n")

        info = follow(through, job_id, write)
    before, after = "".join(log).split("cut\n")
    assert read_numbers(after)
    assert read_numbers(before + after) == list(range(40))
    assert jobs.state(info).exit_code == 0


def test_the_log_comes_where_no_stream_gets_through(
    client: Client, ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a proxy that speaks HTTP alone; this machine's own proxy is not asked."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    job_id = start(client, make_probe("no-stream", 8, 1.0, 0))
    log: list[str] = []
    had_ended: list[bool] = []

    def write(part: str) -> None:
        log.append(part)
        had_ended.append(client.details(job_id).status.is_terminal())

    with FaultyProxy(ray_cluster.address) as proxy:
        follow(connect(proxy.url, ray_cluster.environ), job_id, write)
    assert not had_ended[0]
    assert read_numbers("".join(log)) == list(range(8))


def test_a_silent_stream_is_asked_again_without_a_line_twice(client: Client) -> None:
    job_id = start(client, make_probe("silent", 4, 1.0, 0))
    log, code = follow_to_end(client, job_id, idle_timeout_s=0.7)
    assert (read_numbers(log), code) == ([0, 1, 2, 3], 0)


def test_a_cluster_that_goes_away_ends_the_following(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = start(client, make_probe("away", 600, 0.1, 0))
    notes: list[object] = []
    with _Relay(ray_cluster.address) as relay:
        through = connect(relay.address, ray_cluster.environ)
        with pytest.raises(OutOfReachError, match="no answer"):
            follow(through, job_id, lambda _: relay.close(), notes.append, retry_timeout_s=1.0)
    assert "the job goes on, trying again" in str(notes[-1])
    assert len(notes) == len(set(notes))
    assert jobs.state(jobs.cancel(client, job_id)).exit_code == 130


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_may_pass_is_waited_out(
    client: Client, ray_cluster: RayCluster, status: int
) -> None:
    """Also that the log is whole: a proxy that speaks HTTP alone lets no stream through."""
    job_id = start(client, make_probe(f"busy-{status}", 5, 0.1, 3))
    rules = [
        Rule("GET", f"/api/jobs/{job_id}/logs", "answer", status, times=2),
        Rule("GET", f"/api/jobs/{job_id}", "answer", status, times=2),
    ]
    notes: list[object] = []
    with FaultyProxy(ray_cluster.address) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        proxy.rules += rules
        log, code = follow_to_end(through, job_id, tell=notes.append)
    assert (read_numbers(log), code) == ([0, 1, 2, 3, 4], 1)
    assert len(proxy.injected) == 4
    assert f"answers HTTP {status}: " in str(notes[0])


def test_a_job_that_went_with_the_head_is_lost_not_unknown(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = start(client, make_probe("lost", 600, 0.1, 0))
    forgotten = Rule("GET", f"/api/jobs/{job_id}", "answer", 404, times=99, skip=1)
    with FaultyProxy(ray_cluster.address, [forgotten]) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        with pytest.raises(LostError, match=r"lost with the head.*submit again") as raised:
            follow_to_end(through, job_id)
    assert raised.value.exit_code == 1
    jobs.cancel(client, job_id)


class _Relay:
    """A port that leads to the dashboard, and whose connections can be cut."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> _Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Drop what is connected now; new connections are welcome."""
        sides, self._open = self._open, []
        for side in sides:
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()

    def close(self) -> None:
        """Drop what is connected, and accept no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
