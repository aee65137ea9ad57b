"""What is logged arrives, stays inside the run, and never fails the job."""

import io
import json
import os
import socket
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pneumo.config import TrackingConfig
from pneumo.reporting.tracking import (
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    MemoryTracker,
    NullTracker,
    Overlay,
    Page,
    Picture,
    PictureTable,
    Table,
    TrackingOutcome,
    choose_mode,
    open_tracker,
)
from tests.pneumo.reporting.tracking.wandb_server import serve

# wandb leaves its temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
KEY = "0123456789" * 4


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """No login, no W&B setting, and a home folder in which nothing may appear."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NETRC", raising=False)
    return home


def png(size=8):
    buffer = io.BytesIO()
    Image.new("L", (size, size), 90).save(buffer, "PNG")
    return buffer.getvalue()


def log_everything(tracker, folder):
    log_all_but_the_end(tracker, folder)
    return tracker.finish()


def log_all_but_the_end(tracker, folder):
    weights = folder / "weights.bin"
    weights.write_bytes(b"weights")
    tracker.log({"train/loss": 0.7, "val/auroc": None}, epoch=1)
    tracker.log({"train/loss": 0.5, "val/auroc": 0.8}, epoch=2)
    tracker.log_media("eval/gallery", Gallery([Picture(png(), "TP p=0.9", [(1, 2, 3, 4)])]))
    tracker.log_media("eval/roc", LineChart({"test": ([0, 1], [0, 1])}, "ROC", "FPR", "TPR"))
    tracker.log_media(
        "eval/confusion", ConfusionChart({"tp": 1, "fp": 2, "fn": 3, "tn": 4}, "Test")
    )
    tracker.log_media("eval/predictions", Table(["key", "p"], [["a", 0.1], ["b", None]]))
    tracker.log_media("eval/report", Page("<p>report</p>"))
    tracker.log_artifact(
        Artifact("shards", "dataset", {"manifest.json": weights}, metadata={"digest": "abc"}),
        role="input",
    )
    tracker.log_artifact(Artifact("net", "model", {"weights.bin": weights}, ["best"]))
    tracker.summarise({"test/auroc": 0.8, "test/f1": None})


def read_run(folder: Path):
    """The records of a .wandb file: a LevelDB log in blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    (path,) = folder.glob("*.wandb")
    data = path.read_bytes()
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    at, part, records = 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(body, zlib.crc32(bytes([kind])))
        at += 7 + length
        part = body if kind in (1, 2) else part + body
        if kind in (1, 4):  # whole, or the last piece
            record = pb.Record()
            record.ParseFromString(part)
            records.append(record)
    return records


def items(entries):
    return {"/".join(e.nested_key) or e.key: json.loads(e.value_json) for e in entries}


def warned(caplog):
    return [
        r.getMessage() for r in caplog.records if r.name.startswith("pneumo.reporting.tracking")
    ]


def open_offline(folder, **changes):
    arguments = {
        "run_dir": folder,
        "name": "evaluate-1",
        "job_type": "evaluate",
        "group": "demo",
        "settings": {"seed": 3},
        "start_timeout_s": 2.0,
        "finish_timeout_s": 5.0,
    }
    return open_tracker(TrackingConfig(mode="offline"), **{**arguments, **changes})


def test_memory_tracker_keeps_everything(tmp_path):
    tracker = MemoryTracker()
    outcome = log_everything(tracker, tmp_path)

    assert tracker.history == [
        {"epoch": 1, "train/loss": 0.7},
        {"epoch": 2, "train/loss": 0.5, "val/auroc": 0.8},
    ]
    assert tracker.media["eval/confusion"].rows()[0] == ("0", "0", 4)
    assert tracker.media["eval/roc"].rows() == [("test", 0.0, 0.0), ("test", 1.0, 1.0)]
    assert [(role, artifact.name) for role, artifact in tracker.artifacts] == [
        ("input", "shards"),
        ("output", "net"),
    ]
    assert tracker.summary == {"test/auroc": 0.8}
    assert tracker.is_finished
    assert outcome.lines() == []


def test_offline_run_read_back(tmp_path, clean_environment):
    run_dir = tmp_path / "run"
    before = dict(os.environ)
    outcome = log_everything(open_offline(run_dir), tmp_path)

    assert dict(os.environ) == before
    assert list(clean_environment.iterdir()) == []
    assert outcome.mode == "offline"
    assert outcome.failures == ()
    assert outcome.folder.is_relative_to(run_dir)
    assert outcome.lines() == [
        f"W&B: offline, nothing sent; to send it: wandb sync {outcome.folder}"
    ]
    records = read_run(outcome.folder)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.run_group, run.job_type) == ("pneumo", "demo", "evaluate")
    assert items(run.config.update)["seed"] == 3
    history = [items(r.history.item) for r in records if r.HasField("history")]
    assert [(h["epoch"], h["train/loss"]) for h in history if "epoch" in h] == [(1, 0.7), (2, 0.5)]
    steps = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert steps["train/*"] == steps["val/*"] == "epoch"
    summary = {
        k: v for r in records if r.HasField("summary") for k, v in items(r.summary.update).items()
    }
    assert summary["test/auroc"] == 0.8
    logged = {key: value for step in history for key, value in step.items()}
    assert logged["eval/gallery/captions"] == ["TP p=0.9"]
    assert "boxes" in logged["eval/gallery/all_boxes"][0]
    assert logged["eval/roc_table/nrows"] == 2
    assert logged["eval/confusion_table/nrows"] == 4
    assert logged["eval/predictions/ncols"] == 2
    assert logged["eval/report/_type"] == "html-file"

    artifacts = {r.artifact.name: r.artifact for r in records if r.HasField("artifact")}
    assert "best" in artifacts["net"].aliases
    (entry,) = artifacts["net"].manifest.contents
    assert Path(entry.local_path).is_relative_to(run_dir)  # or `wandb sync` loses it
    assert Path(entry.local_path).read_bytes() == b"weights"
    config = [items(r.config.update) for r in records if r.HasField("config")]
    shards = {"name": "shards", "type": "dataset", "digest": "abc"}
    assert [shards] in [c.get("inputs") for c in config]


def test_nothing_reaches_the_terminal(tmp_path, clean_environment, capfd):
    open_offline(tmp_path / "run").finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "UsageError"),
        ({"WANDB_API_KEY": "short"}, "AuthenticationError"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "CommError"),
    ],
)
def test_goes_on_offline_when_online_fails(
    tmp_path, clean_environment, monkeypatch, caplog, environment, reason
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = open_tracker(
        TrackingConfig(mode="online"),
        run_dir=tmp_path,
        name="n",
        job_type="train",
        group=None,
        settings={},
        start_timeout_s=2.0,
        finish_timeout_s=5.0,
    )
    tracker.log({"train/loss": 1.0}, epoch=1)
    outcome = tracker.finish()

    assert outcome.mode == "offline"
    assert outcome.sync_command is not None
    (line,) = outcome.failures
    assert line.startswith("W&B: could not start online; going on offline")
    assert reason in line
    assert KEY not in caplog.text
    assert warned(caplog) == [line]


def test_a_fault_while_logging_is_told_and_does_no_harm(tmp_path, clean_environment, caplog):
    tracker = open_offline(tmp_path)
    missing = Artifact("net", "model", {"weights.bin": tmp_path / "missing"})
    tracker.log_artifact(missing)
    tracker.log_media("eval/gallery", Gallery([Picture(b"no image", "")]))
    tracker.log({"train/loss": 1.0}, epoch=1)
    outcome = tracker.finish()

    assert list(outcome.failures) == warned(caplog)
    assert len(outcome.failures) == 2
    assert outcome.failures[0].startswith("W&B: could not log artifact net (")
    assert any(r.HasField("history") for r in read_run(outcome.folder))


def test_goes_on_without_when_nothing_can_be_written(tmp_path, clean_environment, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way of a folder")
    tracker = open_offline(blocked)
    assert isinstance(tracker, NullTracker)
    assert log_everything(tracker, tmp_path).lines() == []
    assert "going on without" in caplog.text


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "shared"}, "offline"),
        ("online", {}, "online"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_mode(tmp_path, config, environment, expected):
    found = choose_mode(TrackingConfig(mode=config), {"HOME": str(tmp_path), **environment})
    assert found == expected


def test_a_login_counts_for_its_own_server_only(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    home = {"HOME": str(tmp_path)}
    auto = TrackingConfig(mode="auto")
    assert choose_mode(auto, home) == "online"
    assert choose_mode(auto, {**home, "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    (tmp_path / ".netrc").write_text("no netrc\n")
    assert choose_mode(auto, home) == "offline"


def test_disabled_needs_no_folder(tmp_path):
    tracker = open_tracker(
        TrackingConfig(mode="disabled"),
        run_dir=tmp_path / "none",
        name="n",
        job_type="train",
        group=None,
        settings={},
    )
    assert isinstance(tracker, NullTracker)
    assert log_everything(tracker, tmp_path) == TrackingOutcome("disabled")
    assert not (tmp_path / "none").exists()


def test_outcome_says_what_to_do():
    folder = Path("runs/a b/wandb/run-1")
    sent = TrackingOutcome("online", folder, "https://wandb.example.org/r")
    assert sent.lines() == ["W&B: https://wandb.example.org/r"]
    half = TrackingOutcome("offline", folder, "https://wandb.example.org/r", ("W&B: …",))
    assert half.lines() == ["W&B: not all was sent; to send it: wandb sync 'runs/a b/wandb/run-1'"]


def open_online(folder, backend, monkeypatch, key=KEY, **changes):
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", backend.url)
    return open_tracker(
        TrackingConfig(mode="online"),
        run_dir=folder,
        name="evaluate-1",
        job_type="evaluate",
        group="demo",
        settings={"seed": 3},
        start_timeout_s=5.0,
        finish_timeout_s=6.0,
        request_timeout_s=1.0,
        **changes,
    )


def test_online_everything_arrives(tmp_path, clean_environment, monkeypatch):
    with serve(KEY) as backend:
        outcome = log_everything(open_online(tmp_path / "run", backend, monkeypatch), tmp_path)
    assert outcome.failures == ()
    assert outcome.mode == "online"
    assert outcome.sync_command is None
    history = [row for row in backend.history() if "epoch" in row]
    assert [(row["epoch"], row["train/loss"]) for row in history] == [(1, 0.7), (2, 0.5)]
    assert {a["name"]: a["state"] for a in backend.artifacts.values()}["net"] == "COMMITTED"
    assert backend.used == ["shards"]
    assert b"weights" in backend.uploads.values()
    assert any("media/images/eval/gallery" in name for name in backend.uploads)


def test_a_wrong_key_goes_on_offline(tmp_path, clean_environment, monkeypatch, caplog):
    with serve(KEY) as backend:
        tracker = open_online(tmp_path / "run", backend, monkeypatch, key="9" * 40)
        outcome = log_everything(tracker, tmp_path)
    assert outcome.mode == "offline"
    assert "going on offline" in outcome.failures[0]
    assert "9" * 40 not in caplog.text
    assert "wandb sync" in outcome.lines()[0]
    assert backend.runs == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "when"),
    [
        ("away", "start"),
        ("away", "middle"),
        ("away", "end"),
        ("uploads 403", "middle"),
        ("uploads 403", "late"),
        ("uploads 403", "end"),
        ("uploads 503", "middle"),
        ("uploads hang", "late"),
        ("uploads hang", "end"),
        ("GraphQL hangs", "start"),
        ("GraphQL hangs", "middle"),
    ],
)
def test_a_fault_of_the_server_neither_fails_nor_hangs_nor_loses_anything(
    tmp_path, clean_environment, monkeypatch, fault, when
):
    """late: between what was used and what was made; end: after the last artifact."""
    with serve(KEY) as backend:
        backend.fault = fault if when == "start" else None
        started = time.monotonic()
        tracker = open_online(tmp_path / "run", backend, monkeypatch)
        backend.fault = fault if when in ("start", "middle") else None
        log_inputs(tracker)
        backend.fault = fault if when in ("start", "middle", "late") else None
        log_all_but_the_end(tracker, tmp_path)
        backend.fault = fault
        tracker.log_media("eval/last", Gallery([Picture(png(16), "last")]))
        outcome = tracker.finish()
        assert time.monotonic() - started < 90

    assert outcome.mode == "offline"
    assert outcome.failures
    assert outcome.lines()[0].endswith(f"wandb sync {outcome.folder}")
    assert_complete(read_run(outcome.folder))
    assert (outcome.folder / "files" / "media" / "images" / "eval").is_dir()


def log_inputs(tracker):
    tracker.log({"train/loss": 0.7}, epoch=1)
    content = {"manifest.json": b"{}"}
    for name in ("shards", "other"):
        tracker.log_artifact(Artifact(name, "dataset", content), role="input")


def assert_complete(records):
    """One run holds all of it, whatever had been sent before."""
    history = [items(r.history.item) for r in records if r.HasField("history")]
    rows = [(h["epoch"], h["train/loss"]) for h in history if "epoch" in h]
    assert rows == [(1, 0.7), (1, 0.7), (2, 0.5)]
    logged = {key for row in history for key in row}
    assert {"eval/gallery/captions", "eval/roc_table/nrows", "eval/report/_type"} <= logged
    assert "eval/last/captions" in logged
    artifacts = {r.artifact.name: r.artifact for r in records if r.HasField("artifact")}
    assert "best" in artifacts["net"].aliases
    configs = [items(r.config.update) for r in records if r.HasField("config")]
    assert [i["name"] for i in configs[-1]["inputs"]] == ["shards", "other", "shards"]
    summary = [items(r.summary.update) for r in records if r.HasField("summary")]
    assert {"test/auroc": 0.8} in summary


@pytest.mark.slow
def test_a_step_that_never_ends_is_left_behind(tmp_path, clean_environment, monkeypatch):
    with serve(KEY) as backend:
        tracker = open_online(tmp_path / "run", backend, monkeypatch, step_timeout_s=1.0)
        backend.fault = "uploads hang"
        log_inputs(tracker)
        outcome = tracker.finish()
    assert "TimeoutError: no answer for 1 s" in outcome.failures[0]
    assert outcome.sync_command is not None


def test_inputs_keep_their_aliases_and_stand_in_the_config(
    tmp_path, clean_environment, monkeypatch
):
    with serve(KEY) as backend:
        tracker = open_online(tmp_path / "run", backend, monkeypatch)
        for name in ("model-a", "model-b"):
            used = Artifact(name, "model", {"x": name.encode()}, ["best"], {"run": name[-1]})
            tracker.log_artifact(used, role="input")
        assert tracker.finish().failures == ()
    given = {a["name"]: a["input"].get("aliases") for a in backend.artifacts.values()}
    for name in ("model-a", "model-b"):
        assert "best" not in str(given[name])
    assert backend.used == ["model-a", "model-b"]
    (run,) = backend.runs.values()
    kept = json.loads(run["config"])["inputs"]["value"]
    assert [(i["name"], i["run"]) for i in kept] == [("model-a", "a"), ("model-b", "b")]


def test_host_and_command_line_are_not_told(tmp_path, clean_environment, monkeypatch):
    with serve(KEY) as backend:
        log_everything(open_online(tmp_path / "run", backend, monkeypatch), tmp_path)
    sent = b"".join(backend.uploads.values()) + json.dumps(backend.runs).encode()
    for private in (f'"{socket.gethostname()}"', sys.executable, "-m pytest", "--tb"):
        assert private.encode() not in sent


def test_overlays_and_thumbnails_are_read_back(tmp_path, clean_environment):
    mask = Overlay(np.eye(8, dtype=np.uint8), {1: "map ≥ 25 %"}, "Grad-CAM")
    picture = Picture(png(), "TP p=0.9", [(1, 2, 3, 4)], mask=mask)
    tracker = open_offline(tmp_path / "run")
    tracker.log_media("eval/gallery/tp", Gallery([picture]))
    rows = [[picture, "tp", 0.9], [picture, "fn", None]]
    tracker.log_media("eval/predictions", PictureTable(["picture", "outcome", "p"], rows))
    outcome = tracker.finish()
    assert outcome.failures == ()
    records = read_run(outcome.folder)
    logged = {
        k: v for r in records if r.HasField("history") for k, v in items(r.history.item).items()
    }
    assert "Grad-CAM" in logged["eval/gallery/tp/all_masks"][0]
    assert logged["eval/predictions/nrows"] == 2
    layers = list((outcome.folder / "files" / "media" / "images" / "mask").rglob("*.mask.png"))
    assert layers
    assert np.array_equal(np.asarray(Image.open(layers[0])), np.eye(8))
