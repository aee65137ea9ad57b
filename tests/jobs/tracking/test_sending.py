"""A job and a W&B that fails in every way: the job goes on, one line names the command, and the
command sends the rest."""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jobs import track
from jobs.tracking.sending import command, read_messages, sending_to_wandb
from pneumo.config import TrackingConfig
from tests.conftest import StoreMaker
from tests.pneumo.reporting.tracking.run_folders import write_training
from tests.pneumo.reporting.tracking.wandb_server import KEY, Backend

ONLINE = TrackingConfig(mode="online")
PATIENCE_S = 240.0
"""A loaded machine is no fault of W&B's."""


@pytest.fixture(scope="module")
def store(tiny_store: StoreMaker) -> str:
    return tiny_store()


def wait_for(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.1)


def send_again(run: Path, backend: Backend, exit_code: int = 0, times: int = 1) -> None:
    """The command completes the one run that there is at W&B, as often as it is given."""
    for _ in range(times):
        assert track.main(["--run", str(run)]) == 0
        (name,) = backend.runs
        assert backend.epochs(name) == [1, 2, 3]
        assert backend.exit_codes[name] == exit_code
        assert backend.summary(name)["val/auroc"] == 0.9
    states = {one["name"]: one["state"] for one in backend.artifacts.values()}
    assert set(states.values()) == {"COMMITTED"}
    assert (f"model-{name}" in states) == (exit_code == 0)
    assert backend.unknown == []


@contextlib.contextmanager
def job(run: Path, store: str, idle_timeout_s: float = PATIENCE_S) -> Iterator[list[str]]:
    """A training of which the first epoch is there; what is told of W&B."""
    write_training(run, store, epochs=1, finished=False)
    told: list[str] = []
    with sending_to_wandb(
        str(run), ONLINE, "train", told.append, interval_s=0.2, idle_timeout_s=idle_timeout_s
    ):
        yield told


def test_a_running_job_is_followed_and_its_end_is_told(
    tmp_path: Path,
    store: str,
    backend: Backend,
    clean_environment: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with job(run, store) as told:
        wait_for(lambda: bool(backend.runs))
        assert backend.exit_codes == {}
        write_training(run, store, epochs=3)
    (name,) = backend.runs
    assert told == [f"W&B: {backend.url}/tester/pneumo/runs/{name}"]
    assert backend.epochs(name) == [1, 2, 3]
    assert backend.exit_codes == {name: 0}
    assert capfd.readouterr() == ("", "")
    assert list(clean_environment.iterdir()) == []
    send_again(run, backend, times=2)


def test_lines_that_are_no_messages_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('wandb: WARNING it is late\\n1\\n[]\\n' + '{\"url\": \"no job type\"}')"
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[str] = []
    with sending_to_wandb(str(tmp_path / "run"), ONLINE, "train", told.append):
        pass
    assert told == []
    assert read_messages(b"\xff\nNaN\n{\n" + b'{"step": "x"}\n') == [{"step": "x"}]


def test_a_sender_of_which_nothing_can_be_read_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    told: list[str] = []
    before = set(psutil.Process().children())
    with sending_to_wandb(str(tmp_path / "run"), ONLINE, "train", told.append, interval_s=60):
        for folder in tmp_path.glob("pneumo-tracking-*"):
            for process in set(psutil.Process().children()) - before:
                process.kill()
            shutil.rmtree(folder)
    (line,) = told
    assert line.startswith("W&B: not all sent (FileNotFoundError: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "when"),
    [
        ("away", "start"),
        ("away", "middle"),
        ("away", "end"),
        ("GraphQL hangs", "start"),
        ("GraphQL hangs", "middle"),
        ("uploads hang", "middle"),
        ("uploads 403", "start"),
        ("uploads 503", "end"),
    ],
)
def test_no_fault_of_the_server_matters_and_the_command_completes_it(
    tmp_path: Path,
    store: str,
    backend: Backend,
    fault: str,
    when: str,
) -> None:
    run = tmp_path / "run"
    backend.fault = fault if when == "start" else None  # type: ignore[assignment]
    with job(run, store, idle_timeout_s=5.0) as told:
        if when != "start":
            wait_for(lambda: bool(backend.runs))
        if when == "end":
            write_training(run, store, epochs=2, finished=False)
            wait_for(lambda: bool(backend.history()))
        backend.fault = fault  # type: ignore[assignment]
        write_training(run, store, epochs=3)
    (line,) = told
    assert line.startswith("W&B: not all sent (")
    assert line.endswith(f"to send it: {command(str(run))}")
    backend.fault = None
    send_again(run, backend, times=2)


def test_a_wrong_key_is_told_and_not_shown(
    tmp_path: Path,
    store: str,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_API_KEY", "9" * 40)
    with job(run, store) as told:
        write_training(run, store, epochs=3)
    assert told[0].endswith(f"to send it: {command(str(run))}")
    assert "9" * 40 not in told[0]
    assert backend.runs == {}
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    send_again(run, backend)


@pytest.mark.parametrize("mode", ["auto", "offline", "disabled"])
def test_without_a_key_or_leave_nothing_is_started(
    tmp_path: Path,
    clean_environment: Path,
    mode: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []
    config = TrackingConfig.model_validate({"mode": mode})
    before = set(psutil.Process().children())  # Ray's, where other tests have started it
    with sending_to_wandb(str(tmp_path), config, "train", told.append):
        assert set(psutil.Process().children()) <= before
    nothing = f"W&B: nothing sent (offline, or without a key); to send it: {command(str(tmp_path))}"
    assert told == ([] if mode == "disabled" else [nothing])
    assert track.main(["--run", str(tmp_path)]) == 2
    assert "WANDB_API_KEY" in capsys.readouterr().err


def test_a_cancelled_job_is_not_told_as_finished_and_loses_nothing(
    tmp_path: Path,
    store: str,
    backend: Backend,
) -> None:
    """Ray sends its SIGINT to the job and to all processes below it, wandb's service among them."""
    run = tmp_path / "run"
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(KeyboardInterrupt), job(run, store) as told:  # noqa: PT012  raised within
        wait_for(lambda: bool(backend.runs))
        write_training(run, store, epochs=3, finished=False)
        for process in set(psutil.Process().children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGINT)
        raise KeyboardInterrupt
    assert len(told) == 1  # sent in time or not
    assert set(backend.exit_codes.values()) <= {1}
    send_again(run, backend, exit_code=1)
    write_training(run, store, epochs=3)  # the same command goes on to its end
    send_again(run, backend)


def test_a_job_that_is_killed_leaves_a_sender_that_sends_the_rest(
    tmp_path: Path,
    store: str,
    backend: Backend,
) -> None:
    run = write_training(tmp_path / "run", store, epochs=3, finished=False)
    begin = f"SenderProcess({str(run)!r}, ['train'], interval_s=60.0); os.kill(os.getpid(), 9)"
    script = f"import os; from jobs.tracking.sending import SenderProcess; {begin}"
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: bool(backend.exit_codes))
    (name,) = backend.runs
    assert backend.epochs(name) == [1, 2, 3]
    assert backend.exit_codes == {name: 1}


def test_what_was_deleted_at_wandb_is_sent_anew_when_asked(
    tmp_path: Path,
    store: str,
    backend: Backend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_training(tmp_path / "run", store)
    assert track.main(["--run", str(run)]) == 0
    backend.deleted |= set(backend.runs)
    backend.runs.clear()
    assert track.main(["--run", str(run)]) == 1
    said = capsys.readouterr().err
    assert "was deleted at W&B, which takes no id twice" in said
    assert "--anew" in said
    assert track.main(["--run", str(run), "--anew"]) == 0
    (name,) = backend.runs
    assert name not in backend.deleted
    assert backend.epochs(name) == [1, 2, 3]


def test_project_and_group_of_the_run_can_be_replaced(
    tmp_path: Path,
    store: str,
    backend: Backend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_training(tmp_path / "run", store, tracking__project="mine")
    flags = ["--tracking.project", "other", "--tracking.group", "ours"]
    assert track.main(["--run", str(run), *flags]) == 0
    (name,) = backend.runs
    assert capsys.readouterr().out == f"train {backend.url}/tester/other/runs/{name}\n"
    assert backend.runs[name]["project"] == "other"
    assert backend.runs[name]["groupName"] == "ours"


def test_a_run_goes_to_the_server_and_team_of_the_saved_login(
    tmp_path: Path, store: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "home" / ".config" / "wandb" / "settings"
    saved.parent.mkdir(parents=True)
    saved.write_text(f"[default]\nbase_url = {backend.url}\nentity = ward\n")
    run = write_training(tmp_path / "run", store)
    told: list[str] = []
    with sending_to_wandb(str(run), ONLINE, "train", told.append):
        pass
    (name,) = backend.runs
    assert told == [f"W&B: {backend.url}/ward/pneumo/runs/{name}"]


def test_a_folder_without_a_run_is_named(
    tmp_path: Path,
    backend: Backend,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "no run"
    assert track.main(["--run", str(folder)]) == 2
    assert "no run: no such folder, or nothing in it" in capsys.readouterr().err
    folder.mkdir()
    (folder / "notes.txt").write_text("of another day")
    assert track.main(["--run", str(folder)]) == 1
    assert "no run: no training, evaluation or search to send" in capsys.readouterr().err
