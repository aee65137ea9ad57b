"""Ray Jobs against a real `ray start --head` with token authentication."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.specifiers import SpecifierSet

from cluster.ray import jobs, sent_code
from cluster.ray.client import Client, connect, sends_token_openly
from cluster.ray.following import LostError, follow
from cluster.submission import Submission, plan
from cluster.targets import OutOfReachError, Started
from pneumo.errors import AccessError, ConfigError
from pneumo.version import REVISION, find_revision
from tests import CHECKOUT
from tests.cluster.http_proxy import FaultyProxy, Rule

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster
    from tests.conftest import StoreMaker


PROBE = CHECKOUT / "tests" / "cluster" / "probe.py"


@pytest.fixture(scope="module")
def client(ray_cluster: RayCluster) -> Client:
    return connect(ray_cluster.address, ray_cluster.environ)


def _probe(name: str, *arguments: object, settings: str = "a", **environ: str) -> Submission:
    return Submission(
        job="train",
        id=f"probe-{name}",
        entrypoint=shlex.join(["python", str(PROBE), *map(str, arguments)]),
        target=f"/nowhere/{name}",
        settings=settings,
        environment=environ,
    )


def _start(client: Client, submission: Submission) -> str:
    return jobs.submit(client, submission, sent_code.collect()).id


def _follow(client: Client, job_id: str, **options: Any) -> tuple[str, int]:
    text: list[str] = []
    info = follow(client, job_id, text.append, **options)
    return "".join(text), jobs.state(info).exit_code


def _numbers(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("line ")]


def test_code_and_environment_arrive_and_the_log_comes_back(client: Client) -> None:
    asked = ("AWS_REGION", REVISION)
    job_id = _start(client, _probe("ok", 25, 0, 0, *asked, AWS_REGION="eu-north-1"))
    log, code = _follow(client, job_id)
    assert code == 0
    assert _numbers(log) == list(range(25))
    assert "folder jobs pneumo\n" in log
    assert "AWS_REGION is eu-north-1\n" in log
    assert f"{REVISION} is {find_revision(CHECKOUT) or 'absent'}\n" in log
    assert log == client.log_text(job_id)


def test_exit_codes_and_reasons(client: Client) -> None:
    asked = {2: 2, 3: 1, 130: 130}
    ids = {code: _start(client, _probe(f"exit-{code}", 1, 0, code)) for code in asked}
    absent = _start(client, Submission("train", "probe-absent", "no-such-program", "/x", "a"))
    for code, expected in asked.items():
        _, got = _follow(client, ids[code])
        assert got == expected
        assert jobs.failure(client.details(ids[code])) == f"exit code {code}"
    assert _follow(client, absent)[1] == 1
    assert "no command 'python'" in jobs.failure(client.details(absent))


def test_submitting_twice_runs_once(client: Client) -> None:
    asked = _probe("twice", 100, 0.1, 0)
    first = jobs.submit(client, asked, sent_code.collect())
    again = jobs.submit(client, asked, sent_code.collect())
    assert first == Started("probe-twice", already_running=False)
    assert again == Started("probe-twice", already_running=True)
    with pytest.raises(ConfigError, match=r"is being written by probe-twice with other settings"):
        jobs.submit(client, _probe("twice", 100, 0.1, 0, settings="b"), sent_code.collect())
    jobs.cancel(client, first.id)
    third = jobs.submit(client, _probe("twice", 1, 0, 0), sent_code.collect())
    assert third == Started("probe-twice-2", already_running=False)
    assert _follow(client, third.id)[1] == 0


def test_a_dropped_stream_is_taken_up_where_it_stopped(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("dropped", 40, 0.1, 0))
    with _Relay(ray_cluster.address) as relay:
        through = connect(relay.address, ray_cluster.environ)
        threading.Timer(2.5, relay.cut).start()
        log, code = _follow(through, job_id)
    assert relay.cuts > 0
    assert code == 0
    assert _numbers(log) == list(range(40))


def test_a_silent_stream_is_asked_again_without_a_line_twice(client: Client) -> None:
    job_id = _start(client, _probe("silent", 4, 1.0, 0))
    log, code = _follow(client, job_id, idle_timeout_s=0.7)
    assert (_numbers(log), code) == ([0, 1, 2, 3], 0)


def test_a_cluster_that_goes_away_ends_the_following(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("away", 600, 0.1, 0))
    notes: list[object] = []
    with _Relay(ray_cluster.address) as relay:
        through = connect(relay.address, ray_cluster.environ)
        threading.Timer(1.0, relay.close).start()
        with pytest.raises(OutOfReachError, match="no answer"):
            follow(through, job_id, lambda _: None, notes.append, retry_timeout_s=1.0)
    assert "the job goes on, trying again" in str(notes[-1])
    assert len(notes) == len(set(notes))
    assert jobs.state(jobs.cancel(client, job_id)).exit_code == 130


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_may_pass_is_waited_out(
    client: Client, ray_cluster: RayCluster, status: int
) -> None:
    """Also that the log is whole: a proxy that speaks HTTP alone lets no stream through."""
    job_id = _start(client, _probe(f"busy-{status}", 5, 0.1, 3))
    rules = [
        Rule("GET", f"/api/jobs/{job_id}/logs", "answer", status, times=2),
        Rule("GET", f"/api/jobs/{job_id}", "answer", status, times=2),
    ]
    notes: list[object] = []
    with FaultyProxy(ray_cluster.address) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        proxy.rules += rules
        log, code = _follow(through, job_id, tell=notes.append)
    assert (_numbers(log), code) == ([0, 1, 2, 3, 4], 1)
    assert len(proxy.injected) == 4
    assert f"answers HTTP {status}: " in str(notes[0])


def test_a_dashboard_that_is_busy_is_no_wrong_address(ray_cluster: RayCluster) -> None:
    rule = Rule("GET", "/api/version", "answer", 503)
    with (
        FaultyProxy(ray_cluster.address, [rule]) as proxy,
        pytest.raises(OutOfReachError, match="answers HTTP 503"),
    ):
        connect(proxy.url, ray_cluster.environ)


def test_a_job_that_went_with_the_head_is_lost_not_unknown(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("lost", 600, 0.1, 0))
    forgotten = Rule("GET", f"/api/jobs/{job_id}", "answer", 404, times=99)
    with FaultyProxy(ray_cluster.address) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        threading.Timer(1.5, lambda: proxy.rules.append(forgotten)).start()
        with pytest.raises(LostError, match=r"lost with the head.*submit again") as raised:
            _follow(through, job_id)
    assert raised.value.exit_code == 1
    jobs.cancel(client, job_id)


def test_a_job_whose_submission_was_not_answered_is_found(
    client: Client, ray_cluster: RayCluster
) -> None:
    with FaultyProxy(ray_cluster.address) as proxy:
        through = connect(proxy.url, ray_cluster.environ)
        proxy.rules.append(Rule("POST", "/api/jobs/", "drop after"))
        started = jobs.submit(through, _probe("unanswered", 1, 0, 0), sent_code.collect())
        assert started == Started("probe-unanswered", already_running=False)
        proxy.rules.append(Rule("POST", "/api/jobs/", "drop before"))
        with pytest.raises(OutOfReachError, match="no answer"):
            jobs.submit(through, _probe("unheard", 1, 0, 0), sent_code.collect())
    assert _follow(client, started.id)[1] == 0
    assert "probe-unheard" not in {info.submission_id for info in jobs.list_jobs(client)}


def test_down_leaves_the_jobs_of_others_alone(client: Client, ray_cluster: RayCluster) -> None:
    other = client.submit_job(entrypoint="sleep 600", submission_id="somebody-elses")
    mine = _start(client, replace(_probe("mine", 600, 0.1, 0), owner="me@here"))
    yours = _start(client, replace(_probe("yours", 600, 0.1, 0), owner="you@here"))
    asked = ray_cluster.command("down", "--owner", "me@here")
    assert asked.returncode == 2
    assert mine in asked.stderr.splitlines()[-1]
    assert other not in asked.stderr.splitlines()[-1]
    done = ray_cluster.command("down", "--owner", "me@here", "--yes")
    assert done.returncode == 0, done.stderr
    left = done.stderr.splitlines()[0]
    assert left.startswith("not cancelled, as they are not of me@here: ")
    assert {other, yours} == set(left.rpartition(": ")[2].split(", "))
    assert client.details(mine).status.is_terminal()
    assert not client.details(yours).status.is_terminal()
    assert ray_cluster.command("down", "--all", "--yes").returncode == 0
    assert client.details(yours).status.is_terminal()
    assert not client.details(other).status.is_terminal()
    client.stop_job(other)


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
    asked = _probe("open", 1, 0, 0, AWS_SECRET_ACCESS_KEY="hidden", AWS_REGION="eu-north-1")
    with _Dashboard("2.51.0", "3.11.7") as dashboard:
        client = connect(dashboard.address, {"RAY_AUTH_MODE": "disabled"})
        with pytest.raises(ConfigError, match=r"runs Ray 2\.51"):
            jobs.RayTarget(address, client).submit(asked, notes.append)
    told = f"warning: AWS_SECRET_ACCESS_KEY will go to {address} unencrypted; "
    assert [note.startswith(told) for note in notes] == [True] * warned
    assert "hidden" not in "".join(notes)


@contextmanager
def _following(
    cluster: RayCluster, job_id: str, until: str = "line 1"
) -> Iterator[subprocess.Popen[str]]:
    """`logs --follow` in a process of its own, which has shown a line of the job."""
    with subprocess.Popen(
        [sys.executable, "-m", "cluster", "logs", job_id, "--follow"],
        env=dict(cluster.environ),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            while until not in (line := process.stdout.readline()):
                assert line, "the log ended"
            yield process
        finally:
            process.kill()


def test_control_c_detaches_and_cancel_stops_gently(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = _start(client, _probe("control-c", 600, 0.1, 0))
    with _following(ray_cluster, job_id) as following:
        following.send_signal(signal.SIGINT)
        _, error = following.communicate(timeout=20)
    assert following.returncode == 130
    detached, hint = error.splitlines()
    assert f"to follow it: python -m cluster logs {job_id} --follow --address" in detached
    assert hint == "Ctrl-C again within 3 s cancels it"
    assert not client.details(job_id).status.is_terminal()
    assert ray_cluster.command("cancel", job_id).stderr == f"{job_id} cancelled\n"
    log, code = _follow(client, job_id)
    assert code == 130
    assert "probe: interrupted" in log


def test_control_c_twice_cancels(client: Client, ray_cluster: RayCluster) -> None:
    job_id = _start(client, _probe("control-c-twice", 600, 0.1, 0))
    with _following(ray_cluster, job_id) as following:
        following.send_signal(signal.SIGINT)
        assert following.stderr is not None
        while "Ctrl-C again" not in (line := following.stderr.readline()):
            assert line, "it ended without a second thought"
        following.send_signal(signal.SIGINT)
        _, error = following.communicate(timeout=20)
    assert following.returncode == 130
    assert error == f"{job_id} cancelled\n"
    assert jobs.state(client.details(job_id)).phase == "cancelled"


@pytest.mark.slow
def test_a_head_that_ignores_control_c_passes_it_on(scripted_cluster: RayCluster) -> None:
    """Jobs install the handler that they did not inherit; of one that does not, it is said."""
    client = connect(scripted_cluster.address, scripted_cluster.environ)
    body = "print('line 1', flush=True) or time.sleep(600)"
    ours = (
        "import sys, time; from jobs.terminal.entry_point import run_main; "
        f"sys.exit(run_main('train', lambda _: {body}))"
    )
    for name, code, told in (
        ("ours", ours, "cancelled"),
        ("stubborn", f"import time; {body}", "cancelled: it did not stop by itself and was killed"),
    ):
        entrypoint = shlex.join(["python", "-c", code])
        job_id = _start(client, replace(_probe(name), entrypoint=entrypoint))
        with _following(scripted_cluster, job_id) as following:
            asked = scripted_cluster.command("cancel", job_id)
            _, followed = following.communicate(timeout=60)
        status = scripted_cluster.command("status", job_id).stdout
        assert asked.stderr.startswith(f"{job_id} {told}"), asked.stderr
        assert followed.startswith(f"{job_id} {told}"), followed
        assert ("was killed" in status) == (name == "stubborn"), status
        assert following.returncode == 130
        assert ("train: interrupted" in client.log_text(job_id)) == (name == "ours")


@pytest.mark.slow
def test_a_training_under_a_head_that_ignores_control_c_writes_a_checkpoint(
    scripted_cluster: RayCluster, tiny_store: StoreMaker, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = scripted_cluster.command(
        *("submit", "--detach", "train", "--store", tiny_store(), "--run", str(run)),
        *("--model.weights", "random", "--train.epochs", "5000", "--train.batch-size", "16"),
        *("--train.micro-batch-size", "16", "--cluster.num-workers", "1"),
    )
    job_id = asked.stdout.strip()
    with _following(scripted_cluster, job_id, until="epoch   2/5000") as following:
        cancelled = scripted_cluster.command("cancel", job_id)
        log, error = following.communicate(timeout=60)
    assert cancelled.stderr == f"{job_id} cancelled\n", cancelled.stderr
    assert (following.returncode, error) == (130, f"{job_id} cancelled\n")
    assert "train: interrupted; writing a checkpoint" in log
    assert "no checkpoint" not in log
    epochs = [int(n) for n in re.findall(r"^epoch +(\d+)/5000 ", log, re.MULTILINE)]
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    latest = index["entries"][-1]
    assert not index["finished"]
    assert latest["epoch"] >= max(epochs, default=2)


@pytest.mark.slow
def test_a_bucket_out_of_reach_is_told_by_a_preflight_job(ray_cluster: RayCluster) -> None:
    done = ray_cluster.command(
        *("submit", "train", "--store", "s3://bucket/store", "--run", "s3://bucket/runs/1"),
        AWS_ENDPOINT_URL="http://127.0.0.1:1",
        AWS_ACCESS_KEY_ID="somebody",
        AWS_SECRET_ACCESS_KEY="not-to-be-seen",
        AWS_REGION="eu-north-1",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith("error: preflight: s3://bucket/"), line
    assert "no answer within 20 s, seen from the cluster" in line
    assert done.stdout == ""
    assert "preflight" not in ray_cluster.command("list").stdout


def test_a_preflight_that_passes(client: Client, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").touch()  # an empty source is none
    asked = plan(
        "prepare",
        ["--source", str(tmp_path), "--store", str(tmp_path / "store")],
        {},
        remote=False,
        now=datetime.now(),
    )
    said = jobs.preflight(client, asked, sent_code.collect())
    python = ".".join(map(str, sys.version_info[:3]))
    assert said.startswith(f"preflight: Python {python}, Ray {version('ray')}; reached {tmp_path}")
    assert not (tmp_path / "store").exists()
    gone = replace(asked, preflight=asked.preflight.replace("--reads", "--reads /nowhere --reads"))
    with pytest.raises(ConfigError, match="preflight: /nowhere: nothing is there"):
        jobs.preflight(client, gone, sent_code.collect())
    assert not [job for job in jobs.list_jobs(client) if "preflight" in job.submission_id]


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
    sent, submitted, ended = done.stderr.splitlines()
    job_id = ended.split()[0]
    assert submitted.startswith(f"submitted as {job_id}: python -m jobs.prepare --source ")
    assert "MiB before compression; environment: AWS_SECRET_ACCESS_KEY" in sent
    assert ended == f"{job_id} failed: exit code 2"
    status = ray_cluster.command("status", job_id)
    assert "why     exit code 2" in status.stdout
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
def test_prepare_train_and_evaluate_on_the_cluster(ray_cluster: RayCluster, tmp_path: Path) -> None:
    source, store, run = (str(tmp_path / name) for name in ("source", "store", "run"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pneumo.synthetic",
            "--out",
            source,
            "--studies",
            "150",
        ],
        cwd=CHECKOUT,
        env=dict(ray_cluster.environ),
        capture_output=True,
        check=True,
        timeout=120,
    )
    for job, *flags in (
        ("prepare", "--source", source, "--store", store, "--prepare.image-size", "64"),
        (
            *("train", "--store", store, "--run", run, "--recipe", "fast"),
            *("--data.image-size", "64", "--train.epochs", "1", "--train.batch-size", "16"),
        ),
        (
            *("evaluate", "--store", store, "--run", run),
            *("--evaluate.bootstrap-resamples", "100", "--evaluate.saliency", "false"),
            *("--evaluate.pictures", "1"),
        ),
    ):
        done = ray_cluster.command("submit", job, *flags, timeout_s=180)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].endswith("succeeded")
    judged = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert judged["test"]["n"] > 0
    assert "test: " in done.stdout


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
