"""A job's output as it is kept: every test runs a command of its own."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.terminal import log_keeper
from pneumo import storage
from pneumo.errors import StorageError
from tests import CHECKOUT
from tests.waiting import wait_until


def _start(folder: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.terminal.log_keeper", folder, sys.executable, "-uc", code],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kept(folder: Path) -> str:
    [file] = folder.iterdir()
    return file.read_text()


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("print('out'); import sys; print('err', file=sys.stderr); sys.exit(2)", 2),
        ("print('out'); print('err')", 0),
        ("import os; print('out'); print('err'); os.kill(os.getpid(), 9)", 137),
    ],
    ids=["fails", "ends", "is killed"],
)
def test_all_that_a_command_says_is_shown_and_kept(
    tmp_path: Path, code: str, exit_code: int
) -> None:
    with _start(str(tmp_path / "logs"), code) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert (out, err) == ("out\nerr\n", "")
    assert _kept(tmp_path / "logs") == out


def test_it_is_kept_while_the_command_runs(tmp_path: Path) -> None:
    with _start(str(tmp_path / "logs"), "import time; print('begun'); time.sleep(60)") as process:
        wait_until(
            lambda: (tmp_path / "logs").is_dir() and _kept(tmp_path / "logs") == "begun\n",
            "the first line to be kept",
        )
        os.killpg(process.pid, signal.SIGKILL)  # as a node goes
    assert _kept(tmp_path / "logs") == "begun\n"


def test_who_is_told_to_stop_ends_in_its_own_time(tmp_path: Path) -> None:
    """Ray signals the command and this alike; the command's last words are kept."""
    code = (
        "import time\n"
        "try: print('begun'); time.sleep(60)\n"
        "except KeyboardInterrupt: time.sleep(1); print('checkpoint'); raise SystemExit(130)\n"
    )
    with _start(str(tmp_path / "logs"), code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "checkpoint\n")
    assert _kept(tmp_path / "logs") == "begun\ncheckpoint\n"


def test_a_log_that_cannot_be_kept_does_not_cost_the_job() -> None:
    with _start("/proc/version/logs", "print('done')") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "done\n")
    [line] = err.splitlines()
    assert line.startswith("logbook: ")
    assert "the job goes on" in line


def test_no_url_is_the_users_mistake() -> None:
    with _start("gopher://x", "print('never')") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: logbook: storage: unknown scheme")


def test_of_a_long_log_the_end_is_kept(tmp_path: Path) -> None:
    book = log_keeper.Logbook(str(tmp_path / "x.log"), most_bytes=10)
    book.copy(io.BytesIO(b"begin" + b"x" * 1000 + b" the end\n"))
    threading.Thread(target=book.keep_up, daemon=True).start()
    book.close()
    assert _kept(tmp_path) == "x the end\n"


def test_the_end_is_written_though_the_writing_before_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = log_keeper.Logbook(str(tmp_path / "log"))
    book.copy(io.BytesIO(b"all it said"))  # type: ignore[arg-type]
    write = storage.write_bytes

    def fail_once(url: str, data: bytes) -> None:
        monkeypatch.setattr(storage, "write_bytes", write)
        raise StorageError("away")

    monkeypatch.setattr(storage, "write_bytes", fail_once)
    book._keep()
    assert not (tmp_path / "log").exists()
    book._keep()
    assert (tmp_path / "log").read_text() == "all it said"
