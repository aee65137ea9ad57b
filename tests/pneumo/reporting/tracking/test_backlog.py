"""What W&B did not get is kept beside the run, wherever it lies, and sent whole later."""

import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

from pneumo import storage
from pneumo.config import TrackingConfig
from pneumo.errors import TrackingError
from pneumo.reporting.tracking import open_tracker
from pneumo.reporting.tracking.backlog import find_unsent, send_backlog
from pneumo.reporting.tracking.closing import close_tracker, tracking_folder
from pneumo.reporting.tracking.command import main
from pneumo.reporting.tracking.transaction_log import read_records, relocate, write_records
from tests.pneumo.reporting.tracking.test_tracker import KEY, clean_environment, log_all_but_the_end  # noqa: F401
from tests.pneumo.reporting.tracking.wandb_server import serve

pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture
def temporary(clean_environment, monkeypatch, tmp_path):  # noqa: F811
    """The folder of temporary files, and no login."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def track(run_url, folder, mode="offline"):
    """All of a job's run."""
    tracker = open_tracker(
        TrackingConfig(mode=mode),
        run_dir=tracking_folder(run_url),
        name="n",
        job_type="evaluate",
        group=None,
        settings={},
        start_timeout_s=5.0,
        finish_timeout_s=6.0,
        request_timeout_s=1.0,
    )
    log_all_but_the_end(tracker, folder)
    close_tracker(tracker, run_url, lambda line: print(line, file=sys.stderr))


def sync(backend, run_url, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    return main(["sync", run_url])


def states(backend):
    return {a["name"]: a["state"] for a in backend.artifacts.values()}


@pytest.fixture(params=["bucket", "moved"])
def kept(request, tmp_path, temporary):
    """The URL of a run whose W&B files are not where they were written."""
    if request.param == "bucket":
        run_url = f"memory://{os.urandom(8).hex()}/run"
        track(run_url, tmp_path)
        return run_url
    track(str(tmp_path / "before"), tmp_path)
    shutil.move(tmp_path / "before", tmp_path / "after")
    return str(tmp_path / "after")


def test_all_of_it_is_sent_later(kept, temporary, monkeypatch, capsys):
    (log,) = find_unsent(kept)
    with serve(KEY) as backend:
        assert sync(backend, kept, monkeypatch) == 0
    assert capsys.readouterr().out == "1 sent\n"
    assert states(backend)["net"] == "COMMITTED"
    assert set(states(backend).values()) == {"COMMITTED"}
    assert b"weights" in backend.uploads.values()
    assert any("media/images/eval/gallery" in name for name in backend.uploads)
    assert [row["epoch"] for row in backend.history() if "epoch" in row] == [1, 2]
    assert list(temporary.glob("pneumo-*")) == []
    assert storage.exists(storage.join(kept, "wandb", log + ".synced"))
    assert main(["sync", kept]) == 0
    assert "nothing to send" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["bucket"], indirect=True)
def test_what_did_not_arrive_is_said_and_kept(kept, monkeypatch, capsys):
    with serve(KEY) as backend:
        backend.fault = "uploads 403"
        assert sync(backend, kept, monkeypatch) == 1
        assert "not sent whole" in capsys.readouterr().err
        assert len(find_unsent(kept)) == 1
        backend.fault = None
        assert sync(backend, kept, monkeypatch) == 0
    assert states(backend)["net"] == "COMMITTED"


@pytest.mark.parametrize("kept", ["bucket"], indirect=True)
def test_without_a_key_nothing_is_sent_and_it_is_said(kept, capsys):
    assert main(["sync", kept]) == 1
    assert "not sent" in capsys.readouterr().err
    assert len(find_unsent(kept)) == 1


def test_a_run_in_a_bucket_leaves_no_temporary_folder(tmp_path, temporary, monkeypatch, capsys):
    run_url = f"memory://{os.urandom(8).hex()}/run"
    track(run_url, tmp_path, mode="disabled")
    assert list(temporary.glob("pneumo-*")) == []
    assert storage.list_urls(run_url) == []
    track(run_url, tmp_path)
    assert list(temporary.glob("pneumo-*")) == []
    assert f"python -m pneumo.tracking sync {run_url}" in capsys.readouterr().err
    with serve(KEY) as backend:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        track(run_url, tmp_path, mode="online")
    assert list(temporary.glob("pneumo-*")) == []
    assert backend.url in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path, temporary):
    run_url = str(tmp_path / "run")
    track(run_url, tmp_path)
    shutil.rmtree(tmp_path / "run" / "wandb" / "data" / "artifacts" / "staging")
    with pytest.raises(TrackingError, match=r"artifacts/staging/tmp.* is not there"):
        send_backlog(run_url, tmp_path / "copy")


def test_a_log_of_records_longer_than_a_block_is_written_as_it_was_read(tmp_path, temporary):
    track(str(tmp_path / "run"), tmp_path)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = list(read_records(path.read_bytes()))
    for length in (0, 1, 32_740, 32_754, 32_755, 32_761, 32_768, 100_000):
        long = type(records[0])()
        long.run.display_name = "x" * length
        records.insert(3, long)
    data = write_records(records)
    assert list(read_records(data)) == records
    assert list(read_records(data[:-5])) == records[:-1]
    root = path.parents[1]
    assert relocate(data, root) == data


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lambda data: data[1:], "begins otherwise"), (lambda data: data[:40] + b"?" + data[41:], "")],
)
def test_a_damaged_log_is_refused(tmp_path, temporary, damage, words):
    track(str(tmp_path / "run"), tmp_path)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    with pytest.raises(TrackingError, match=words or "damaged at byte"):
        list(read_records(damage(path.read_bytes())))


def test_the_header_is_wandbs_own(tmp_path, temporary):
    """A log that is written here begins as W&B's service begins its own."""
    track(str(tmp_path / "run"), tmp_path)
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert write_records([])[:7] == path.read_bytes()[:7]
    assert struct.calcsize("<4sHB") == 7
    assert Path(path).suffix == ".wandb"
