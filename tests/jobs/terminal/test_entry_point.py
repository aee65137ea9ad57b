import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.terminal.entry_point import find_cause, run_main
from pneumo.errors import ConfigError, DataError, PneumoError, StoreError
from tests import CHECKOUT


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
    )


def raising(error: BaseException) -> int:
    def main(argv: Sequence[str]) -> None:
        raise error

    return run_main("train", main, [])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (StoreError("the store is empty"), 2, "error: the store is empty"),
        (DataError("shard 3 is cut"), 1, "error: shard 3 is cut"),
        (ZeroDivisionError("x"), 1, "error: ZeroDivisionError: x (--debug shows the traceback)"),
        (KeyboardInterrupt(), 130, "train: interrupted; repeat the command to resume"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(line)
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_our_error_is_found_behind_what_ray_wraps_around_it() -> None:
    class WrappedError(Exception):
        def __init__(self, failures: dict[int, Exception]) -> None:
            super().__init__("worker group failed")
            self.worker_failures = failures

    inner = ConfigError("train.batch_size: too large")
    outer = RuntimeError("controller")
    outer.__cause__ = WrappedError({0: inner})
    assert find_cause(outer) is inner
    assert find_cause(RuntimeError("something else")) is None
    missing = RuntimeError("Found no NVIDIA driver on your system. Please check that you have")
    assert "torch finds none there" in str(find_cause(missing))
    too_small = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")
    outer.__cause__ = WrappedError({0: too_small})
    found = find_cause(outer)
    assert isinstance(found, ConfigError)
    assert "--train.micro-batch-size" in str(found)


def test_every_error_survives_the_way_between_processes() -> None:
    def subclasses(kind: type[PneumoError]) -> list[type[PneumoError]]:
        return [kind, *(sub for child in kind.__subclasses__() for sub in subclasses(child))]

    for kind in subclasses(PneumoError):
        copy = pickle.loads(pickle.dumps(kind("what happened")))
        assert type(copy) is kind
        assert str(copy) == "what happened"


def test_debug_shows_the_traceback_and_only_debug_does(tmp_path: Path) -> None:
    command = ("jobs.train", "--store", str(tmp_path / "nowhere"))
    plain = run_process(*command)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "nothing is prepared there" in plain.stderr
    debug = run_process(*command, "--debug")
    assert debug.returncode == 2
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("job", ["prepare", "train", "tune", "evaluate", "predict"])
def test_help_needs_no_cluster_and_says_research_only(job: str) -> None:
    shown = run_process(f"jobs.{job}", "--help")
    assert shown.returncode == 0
    assert "Research use only" in " ".join(shown.stdout.split())


def test_a_ray_job_that_inherits_an_ignored_sigint_is_cancelled_all_the_same() -> None:
    """As of a Ray that a script started with `&`."""
    job = (
        "import sys, time\n"
        "from jobs.terminal.entry_point import run_main\n"
        "def wait(arguments): print('up', flush=True); time.sleep(60)\n"
        "sys.exit(run_main('train', wait))"
    )
    with subprocess.Popen(
        ["bash", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, job],
        cwd=CHECKOUT,
        env={**os.environ, "RAY_JOB_STOP_SIGNAL": "SIGINT"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=50)
    assert (running.returncode, error.count("\n")) == (130, 1)
    assert error.startswith("train: interrupted")
