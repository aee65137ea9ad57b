"""`python -m cluster` as far as it goes without a cluster."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import pytest

from cluster.__main__ import _follow, _show_status, _take_down, main, make_parser
from cluster.targets import JobState, LostError, OutOfReachError, Phase, Write
from pneumo.errors import ClusterError
from tests import CHECKOUT

NOBODY = "http://127.0.0.1:1"


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "arguments are required: COMMAND"),
        ("submit", "submit needs a job, one of: prepare, train, tune, evaluate, predict"),
        ("submit trian", "invalid choice: 'trian'"),
        ("submit train", "--store is required"),
        (f"submit train --address {NOBODY} --store /s --train.lr -1", "train.lr: got '-1'"),
        (f"submit --address {NOBODY} train --store /s --trian.lr 1", "unknown setting --trian.lr"),
        ("submit train --store /s", "no address; give --address"),
        ("list", "no address; give --address"),
        ("list --adress x", "unrecognized arguments|takes no --adress"),
        ("status", "status needs the ID of a job, or --watch"),
        ("list --address 10.0.0.1:6379", "expected that of the dashboard: http://HEAD:8265"),
        ("list --address ray://h:10001", "expected that of the dashboard"),
        ("submit train --address http://10.0.0.1:8265 --store s3://b/s", "--run is required"),
    ],
)
def test_the_users_mistakes_exit_2_in_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    error = _error(capsys)
    assert any(part in error for part in message.split("|")), error


@pytest.mark.parametrize("command", ["list", "submit train --store /s", "logs x --follow"])
def test_a_cluster_that_is_not_there_exits_1_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--address", NOBODY]) == 1
    assert f"no answer from {NOBODY} (connection refused)" in _error(capsys)


def test_the_address_may_come_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", NOBODY)
    assert main(["list"]) == 1
    assert NOBODY in _error(capsys)


def test_a_port_that_never_answers_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert main(["list", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}"]) == 1
    assert "timed out" in _error(capsys)


def test_a_token_file_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere")
    assert main(["list", "--address", NOBODY]) == 2
    assert "RAY_AUTH_TOKEN_PATH=/nowhere" in _error(capsys)


def test_an_error_that_nobody_expected_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise RuntimeError("one\ntwo")

    monkeypatch.setattr(socket, "gethostname", fail)
    assert main(["list", "--address", NOBODY]) == 1
    assert _error(capsys) == "error: RuntimeError: two (--debug shows the traceback)\n"
    assert main(["list", "--address", NOBODY, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--debug", "--address", NOBODY]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "goes_on"), [(LostError("lost with the head"), 0), (OutOfReachError("no answer"), 1)]
)
def test_only_a_job_that_may_still_run_is_said_to_go_on(
    error: ClusterError, goes_on: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cluster:
        flags = "--address x"

        def follow(self, *_: Any) -> JobState:
            raise error

    cluster: Any = Cluster()
    assert _follow(cluster, "train-1") == 1
    told = capsys.readouterr().err
    assert str(error) in told
    assert told.count("the job goes on") == goes_on


class SwallowingCluster:
    """One whose libraries let no KeyboardInterrupt through, as urllib3 may by chance."""

    def __init__(self) -> None:
        self.has_detached, self.cancelled = threading.Event(), threading.Event()

    @property
    def flags(self) -> str:
        self.has_detached.set()
        return "--target k8s"

    def follow(self, job_id: str, write: Write, tell: Write) -> JobState:
        for awaited in (self.has_detached, self.cancelled):
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            awaited.wait(5)
            write("a line of the log")
        return JobState(job_id, "succeeded")

    def state(self, job_id: str) -> JobState:
        return JobState(job_id, "running")

    def cancel(self, job_id: str) -> JobState:
        self.cancelled.set()
        return JobState(job_id, "cancelled")


def test_control_c_reaches_the_command_whatever_its_libraries_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster: Any = SwallowingCluster()
    assert _follow(cluster, "train-1") == 130
    assert cluster.cancelled.is_set()
    out, told = capsys.readouterr()
    assert told.splitlines()[-1] == "train-1 cancelled"
    assert not out


def test_down_cancels_the_others_where_one_does_not_stop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Cluster:
        """One of its jobs does not stop."""

        def __init__(self) -> None:
            names = ("train-1", "train-2", "train-3")
            self.jobs = {name: JobState(name, "running", owner="me") for name in names}

        def list(self) -> list[JobState]:
            return list(self.jobs.values())

        def state(self, job_id: str) -> JobState:
            return self.jobs[job_id]

        def cancel(self, job_id: str) -> JobState:
            phase: Phase = "running" if job_id == "train-1" else "cancelled"
            self.jobs[job_id] = JobState(job_id, phase, owner="me")
            return self.jobs[job_id]

    cluster: Any = Cluster()
    assert _take_down(cluster, "me", confirmed=True) == 1
    assert [job.phase for job in cluster.list()] == ["running", "cancelled", "cancelled"]
    assert "train-1 was asked to stop, but is still running" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu_hours", "shown"), [(None, []), (0.0, []), (1.5, ["1.50"])])
def test_gpu_hours_are_shown_of_runs_that_have_held_some(
    gpu_hours: float | None, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _show_status(JobState("train-1", "running", gpu_hours=gpu_hours))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("GPUs")] == shown


@pytest.mark.parametrize("command", ["--help", "submit --help", "submit train --help"])
def test_help_exits_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["--help", f"submit train --store /s --address {NOBODY}"])
def test_no_torch_on_the_laptop(command: str) -> None:
    """In a process of its own: this one may hold torch from another test."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['cluster', *{command.split()!r}]\n"
        "try: runpy.run_module('cluster', run_name='__main__')\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('code', code)\n"
        "print('heavy', *sorted({'torch', 'torchvision', 'jobs', 'wandb'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    code_line, heavy = done.stdout.strip().splitlines()[-2:]
    assert code_line == ("code 0" if command == "--help" else "code 1")
    assert heavy == "heavy"


@pytest.mark.parametrize("place", ["before the job", "after it"])
@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--detach", "follow", False),
        ("--follow", "follow", True),
        ("--target k8s", "target", "k8s"),
        ("--address http://h:8265", "address", "http://h:8265"),
        ("--context c", "context", "c"),
        ("--namespace n", "namespace", "n"),
        ("--overlay gpu-spot", "overlay", "gpu-spot"),
        ("--image i@sha256:1", "image", "i@sha256:1"),
        ("--workers 3", "workers", 3),
    ],
)
def test_a_flag_of_submit_may_stand_before_the_job_or_after_it(
    place: str, flag: str, name: str, value: object
) -> None:
    words = f"submit {flag} train" if place == "before the job" else f"submit train {flag}"
    options, flags = make_parser().parse_known_args([*words.split(), "--train.lr", "1e-3"])
    assert getattr(options, name) == value
    assert flags == ["--train.lr", "1e-3"]
