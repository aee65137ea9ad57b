"""Ray Jobs against a real `ray start --head` with token authentication."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cluster import package, ray_jobs
from cluster.submission import Submission
from pneumo.errors import AccessError, ConfigError

if TYPE_CHECKING:
    from conftest import RayCluster

pytestmark = pytest.mark.cluster

PROBE = Path(__file__).with_name("probe.py")
CHECKOUT = PROBE.parents[2]


@pytest.fixture(scope="module")
def client(ray_cluster: RayCluster) -> ray_jobs.Client:
    return ray_jobs.connect(ray_cluster.address, ray_cluster.environ)


def _probe(name: str, *arguments: object, settings: str = "a", **environ: str) -> Submission:
    return Submission(
        job="train",
        id=f"probe-{name}",
        entrypoint=shlex.join(["python", str(PROBE), *map(str, arguments)]),
        target=f"/nowhere/{name}",
        settings=settings,
        environment=environ,
    )


def _start(client: ray_jobs.Client, submission: Submission) -> str:
    return ray_jobs.submit(client, submission, package.collect()).id


def _follow(client: ray_jobs.Client, job_id: str, **options: Any) -> tuple[str, int]:
    text: list[str] = []
    info = ray_jobs.follow(client, job_id, text.append, **options)
    return "".join(text), ray_jobs.exit_code(info)


def _numbers(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("line ")]


def test_code_and_environment_arrive_and_the_log_comes_back(client: ray_jobs.Client) -> None:
    job_id = _start(client, _probe("ok", 25, 0, 0, "AWS_REGION", AWS_REGION="eu-north-1"))
    log, code = _follow(client, job_id)
    assert code == 0
    assert _numbers(log) == list(range(25))
    assert "folder jobs pneumo\n" in log
    assert "AWS_REGION is eu-north-1\n" in log
    assert log == ray_jobs.logs(client, job_id)


def test_exit_codes_and_reasons(client: ray_jobs.Client) -> None:
    asked = {2: 2, 3: 1, 130: 130}
    ids = {code: _start(client, _probe(f"exit-{code}", 1, 0, code)) for code in asked}
    absent = _start(client, Submission("train", "probe-absent", "no-such-program", "/x", "a"))
    for code, expected in asked.items():
        _, got = _follow(client, ids[code])
        assert got == expected
        assert ray_jobs.failure(ray_jobs.details(client, ids[code])) == f"exit code {code}"
    assert _follow(client, absent)[1] == 1
    assert "no command 'python'" in ray_jobs.failure(ray_jobs.details(client, absent))


def test_submitting_twice_runs_once(client: ray_jobs.Client) -> None:
    asked = _probe("twice", 100, 0.1, 0)
    first = ray_jobs.submit(client, asked, package.collect())
    again = ray_jobs.submit(client, asked, package.collect())
    assert first == ray_jobs.Started("probe-twice", already_running=False)
    assert again == ray_jobs.Started("probe-twice", already_running=True)
    with pytest.raises(ConfigError, match=r"is being written by probe-twice with other settings"):
        ray_jobs.submit(client, _probe("twice", 100, 0.1, 0, settings="b"), package.collect())
    ray_jobs.cancel(client, first.id)
    third = ray_jobs.submit(client, _probe("twice", 1, 0, 0), package.collect())
    assert third == ray_jobs.Started("probe-twice-2", already_running=False)
    assert _follow(client, third.id)[1] == 0


def test_a_dropped_stream_is_taken_up_where_it_stopped(
    client: ray_jobs.Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("dropped", 40, 0.1, 0))
    with _Relay(ray_cluster.address) as relay:
        through = ray_jobs.connect(relay.address, ray_cluster.environ)
        threading.Timer(2.5, relay.cut).start()
        log, code = _follow(through, job_id)
    assert relay.cuts > 0
    assert code == 0
    assert _numbers(log) == list(range(40))


def test_a_silent_stream_is_asked_again_without_a_line_twice(client: ray_jobs.Client) -> None:
    job_id = _start(client, _probe("silent", 4, 1.0, 0))
    log, code = _follow(client, job_id, silence_s=0.7)
    assert (_numbers(log), code) == ([0, 1, 2, 3], 0)


def test_a_cluster_that_goes_away_ends_the_following(
    client: ray_jobs.Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("away", 600, 0.1, 0))
    notes: list[object] = []
    with _Relay(ray_cluster.address) as relay:
        through = ray_jobs.connect(relay.address, ray_cluster.environ)
        threading.Timer(1.0, relay.close).start()
        with pytest.raises(ray_jobs.OutOfReachError, match="no answer"):
            ray_jobs.follow(through, job_id, lambda _: None, notes.append, patience_s=1.0)
    assert "the job goes on, trying again" in str(notes[-1])
    assert len(notes) == len(set(notes))
    assert ray_jobs.exit_code(ray_jobs.cancel(client, job_id)) == 130


def test_control_c_detaches_and_cancel_stops_gently(
    client: ray_jobs.Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("control-c", 600, 0.1, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "cluster", "logs", job_id, "--follow"],
        env=dict(ray_cluster.environ),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as following:
        try:
            assert following.stdout is not None
            while "line 1" not in (line := following.stdout.readline()):
                assert line, "the log ended"
            following.send_signal(signal.SIGINT)
            _, error = following.communicate(timeout=20)
        finally:
            following.kill()
    assert following.returncode == 130
    assert f"back: python -m cluster logs {job_id} --follow --address" in error
    assert error.count("\n") == 1
    assert not ray_jobs.details(client, job_id).status.is_terminal()
    assert ray_cluster.command("cancel", job_id).stderr == f"{job_id} stopped\n"
    log, code = _follow(client, job_id)
    assert code == 130
    assert "stopped gently" in log


def test_the_given_address_wins_over_the_environment(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    ray_jobs.list_jobs(ray_jobs.connect(ray_cluster.address, ray_cluster.environ))
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_a_wrong_token_and_an_unknown_job(client: ray_jobs.Client, ray_cluster: RayCluster) -> None:
    with pytest.raises(AccessError, match="refuses the token; set RAY_AUTH_TOKEN"):
        ray_jobs.list_jobs(ray_jobs.connect(ray_cluster.address, {"RAY_AUTH_TOKEN": "x" * 32}))
    for ask in (ray_jobs.details, ray_jobs.logs, ray_jobs.cancel):
        with pytest.raises(ConfigError, match=r"no job 'nobody'.*cluster list shows"):
            ask(client, "nobody")


def test_the_users_mistake_that_only_the_cluster_sees(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    done = ray_cluster.command(
        *("submit", "prepare", "--source", str(tmp_path / "nowhere")),
        *("--store", str(tmp_path / "store")),
        AWS_SECRET_ACCESS_KEY="not-to-be-seen",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{tmp_path}/nowhere" in done.stdout.splitlines()[-1]
    submitted, sent, ended = done.stderr.splitlines()
    job_id = ended.split()[0]
    assert submitted.startswith(f"submitted as {job_id}: python -m jobs.prepare --source ")
    assert "MiB before compression; environment: AWS_SECRET_ACCESS_KEY, WANDB_MODE" in sent
    assert ended == f"{job_id} failed: exit code 2"
    status = ray_cluster.command("status", job_id)
    assert "FAILED (exit code 2)" in status.stdout
    assert job_id in ray_cluster.command("list").stdout
    shown = done.stdout + done.stderr + status.stdout + status.stderr
    assert "not-to-be-seen" not in shown


@pytest.mark.slow
def test_a_train_on_an_empty_store_is_the_users_mistake(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "mine.toml").write_text('[model]\nweights = "random"\n')
    done = ray_cluster.command(
        *("submit", "train", "--recipe", str(tmp_path / "mine.toml")),
        *("--store", str(tmp_path / "store"), "--run", str(tmp_path / "run")),
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "--recipe sent/mine.toml" in done.stderr
    assert str(tmp_path / "store") in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_prepare_on_the_cluster_writes_a_store(ray_cluster: RayCluster, tmp_path: Path) -> None:
    source, store = tmp_path / "source", tmp_path / "store"
    subprocess.run(
        [sys.executable, "-m", "pneumo.synthetic", "--out", str(source), "--studies", "60"],
        cwd=CHECKOUT,
        env=dict(ray_cluster.environ),
        capture_output=True,
        check=True,
        timeout=120,
    )
    done = ray_cluster.command(
        *("submit", "prepare", "--source", str(source), "--store", str(store)),
        *("--prepare.image-size", "64"),
        timeout_s=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (store / "manifest.json").is_file()
    assert done.stderr.splitlines()[-1].endswith("succeeded")


class _Relay:
    """A port that leads to the dashboard, and whose connections can be cut."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.cuts = 0
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
            self.cuts += 1
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
