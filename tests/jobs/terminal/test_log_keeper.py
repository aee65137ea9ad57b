"""A job's output as it is kept: every test runs a command of its own."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.terminal.log_keeper import LogKeeper
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
    logs = list(folder.glob("*.log"))
    return logs[0].read_text() if logs else ""


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
    [code_file] = (tmp_path / "logs").glob("*.exit")
    assert code_file.read_text() == str(exit_code)
    assert code_file.with_suffix(".log").exists()


def test_a_later_attempt_at_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    """As after a head that was lost while its driver ended; a first attempt is refused."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    index = {"finished": True, "entries": [{"epoch": 3}]}
    (tmp_path / "run" / "checkpoints" / "index.json").write_text(json.dumps(index))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text("{}")
    train = (
        "import sys; from jobs.terminal.entry_point import run_job; "
        f"sys.exit(run_job('train', 'jobs.training.job:train', ['--store', '{tmp_path}/store', "
        f"'--run', '{tmp_path}/run']))"
    )
    ended = []
    for _ in range(2):
        with _start(str(tmp_path / "logs"), train) as process:
            ended.append((process.communicate(timeout=60)[0], process.returncode))
        time.sleep(1.1)  # logs are named by the second
    (first, refused), (second, done) = ended
    assert (refused, done) == (2, 0)
    assert first.startswith("error: ")
    assert second.startswith("train: an earlier attempt has finished: ")
    assert "holds a finished run of 3 epochs" in second


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
    assert line.startswith("log: ")
    assert "the job goes on" in line


def test_no_url_is_the_users_mistake() -> None:
    with _start("gopher://x", "print('never')") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: log: storage: unknown scheme")


def test_of_a_long_log_the_end_is_kept(tmp_path: Path) -> None:
    keeper = LogKeeper(str(tmp_path / "x.log"), max_bytes=10)
    keeper.copy(io.BytesIO(b"begin" + b"x" * 1000 + b" the end\n"))
    keeper.start()
    keeper.close(0)
    assert _kept(tmp_path) == "x the end\n"


def test_what_could_not_be_written_is_written_next_time_and_then_no_more() -> None:
    written: list[bytes] = []

    def fail_once(url: str, data: bytes) -> None:
        written.append(data)
        if len(written) == 1:
            raise StorageError("away")

    keeper = LogKeeper("s3://bucket/log", write=fail_once)
    keeper.copy(io.BytesIO(b"all it said"))
    for _ in range(3):
        keeper.flush()
    assert written == [b"all it said"] * 2
