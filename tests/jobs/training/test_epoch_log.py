"""What the driver shows and logs of what rank 0 tells it."""

from __future__ import annotations

import re
import time
from concurrent.futures import Future
from typing import Any

import pytest

from jobs.terminal.progress import Progress
from jobs.training.epoch_log import Follower, Stepped, name_for_tracking
from pneumo.network.backbones import Initialisation
from pneumo.reporting.tracking import MemoryTracker
from pneumo.training.callbacks import Epoch, Pace, Start
from tests.jobs.conftest import LocalMailbox


def make_epoch(number: int) -> Epoch:
    names = ("train/loss", "val/loss", "val/auroc", "val/accuracy", "val/precision", "val/recall")
    speed = {"images_per_s": 50.0, "data_wait": 0.01, "epoch_s": 2.0}
    metrics = {"epoch": number, **dict.fromkeys(names, 0.5), "lr": 1e-3, "grad_norm": None}
    return Epoch(number, metrics | speed)


def make_start(epochs: int, step: int = 0) -> Start:
    history = tuple(make_epoch(number).metrics for number in range(1, epochs + 1))
    return Start(Initialisation("random", "going on"), history, step, steps=20)


def step_to(done: int) -> Stepped:
    metrics = {"train/loss": 0.5, "images_per_s": 50.0, "data_wait": 0.2}
    return Stepped(done, 100, Pace(1 + done // 20, done % 20, 20, metrics))


def follow(*messages: Any) -> tuple[Follower, MemoryTracker]:
    mailbox = LocalMailbox(messages)
    ended: Future[None] = Future()
    ended.set_result(None)
    tracker = MemoryTracker()
    follower = Follower(mailbox, tracker, epochs=5)
    follower.follow(ended)
    return follower, tracker


def test_a_driver_that_was_started_again_logs_the_epochs_before_it_too() -> None:
    _, tracker = follow(make_start(2), make_epoch(3))
    assert [record["epoch"] for record in tracker.history] == [1, 2, 3]


def test_epochs_are_logged_once_though_attempts_repeat_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    follower, tracker = follow(make_start(0), make_epoch(1), make_start(1), make_epoch(2))
    # The last epoch of a worker that was lost before it could tell of it.
    follower.catch_up([make_epoch(number).metrics for number in (1, 2, 3)])
    assert [record["epoch"] for record in tracker.history] == [1, 2, 3]
    shown = capsys.readouterr().err
    assert len(re.findall(r"^epoch +\d/5 ", shown, re.MULTILINE)) == 2


def test_what_is_trained_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    follow(make_start(1), step_to(33), make_start(1, step=7), make_start(3))
    models = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model:")]
    assert models == ["model: going on", "model: going on; 6 steps again", "model: going on"]


def test_a_trackers_names_have_a_prefix() -> None:
    named = name_for_tracking(make_epoch(1).metrics | {"data/samples": 20.0})
    assert {name.split("/")[0] for name in named} == {"train", "val", "perf"}
    assert {"train/lr", "train/grad_norm", "perf/images_per_s", "perf/epoch_s"} < set(named)


def test_what_was_done_before_counts_neither_for_the_rate_nor_for_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("train", 1000, "steps", initial=900, interval_s=0.05)
    time.sleep(0.2)
    progress.advance_to(902, "loss 0.5")
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"train: 902/1000 steps, ([\d.]+) a second, about (\d+) s left, loss 0.5", line
    )
    assert found, line
    assert float(found[1]) <= 10
    assert int(found[2]) >= 10


def test_at_a_terminal_the_bar_begins_where_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress("train", 1000, "steps", initial=900)
    assert progress.bar is not None
    progress.advance_to(902)
    assert (progress.bar.initial, progress.bar.n) == (900, 902)
    progress.bar.close()
