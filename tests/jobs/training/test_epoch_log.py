"""What the driver shows of what rank 0 tells it."""

import re
import time
from concurrent.futures import Future
from typing import Any

import pytest

from jobs.terminal.progress import Progress
from jobs.training.epoch_log import EpochDisplay
from pneumo.network.backbones import Initialisation
from pneumo.training.callbacks import Epoch, Metrics, Start, StepProgress
from tests.jobs.conftest import LocalChannel


def make_epoch(number: int) -> Epoch:
    names = ("train/loss", "val/loss", "val/auroc", "val/accuracy", "val/precision", "val/recall")
    speed = {"images_per_s": 50.0, "data_wait": 0.01, "epoch_s": 2.0}
    metrics = {"epoch": number, **dict.fromkeys(names, 0.5), "lr": 1e-3, "grad_norm": None, **speed}
    return Epoch(number, metrics)


def make_start(epochs: int, step: int = 0) -> Start:
    history = tuple(make_epoch(number).metrics for number in range(1, epochs + 1))
    return Start(Initialisation("random", "resuming"), history, step, steps=20)


def step_to(done: int) -> StepProgress:
    metrics: Metrics = {"train/loss": 0.5, "images_per_s": 50.0, "data_wait": 0.2}
    return StepProgress(1 + done // 20, done % 20, 20, metrics)


def follow(*messages: Any) -> None:
    ended: Future[None] = Future()
    ended.set_result(None)
    EpochDisplay(LocalChannel(messages).take, epochs=5).follow(ended)


def list_shown(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Numbers of the epochs on the screen."""
    return [int(n) for n in re.findall(r"^epoch +(\d)/5 ", capsys.readouterr().err, re.MULTILINE)]


def test_epochs_are_shown_once_though_attempts_repeat_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    follow(make_start(0), make_epoch(1), make_start(1), make_epoch(1), make_epoch(2))
    assert list_shown(capsys) == [1, 2]
    follow(make_start(2), make_epoch(3))
    assert list_shown(capsys) == [3]


def test_what_is_trained_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    follow(make_start(1), step_to(33), make_start(1, step=7), make_start(3))
    models = [line for line in capsys.readouterr().err.splitlines() if line.startswith("model:")]
    assert models == ["model: resuming", "model: resuming; 6 steps again", "model: resuming"]


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
