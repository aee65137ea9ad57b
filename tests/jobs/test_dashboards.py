"""The workspaces show what the jobs send, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.evaluation import wandb_results
from jobs.training.epoch_log import Follower
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES
from pneumo.loading.sample_order import World
from pneumo.reporting.figures.case_pictures import Pictures
from pneumo.reporting.tracking import ConfusionChart, LineChart, MemoryTracker
from pneumo.reporting.tracking.dashboards import build_views, describe_view
from pneumo.training.callbacks import Callbacks
from pneumo.training.fit import fit
from tests.conftest import StoreMaker
from tests.jobs.conftest import LocalMailbox
from tests.jobs.evaluation.test_wandb_results import case, judged
from tests.pneumo.reporting.page.test_degenerate import saliency


def list_keys(view: Any) -> set[str]:
    """What the panels of a workspace are told to show."""

    def walk(part: Any, name: str = "") -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(value, key)
        elif isinstance(part, list):
            for value in part:
                yield from walk(value, name)
        elif isinstance(part, str) and (name in ("metrics", "mediaKeys") or part[:5] == "eval/"):
            yield part

    return set(walk(describe_view(view)))


def list_sent(tracker: MemoryTracker) -> set[str]:
    """Under which keys W&B has what a tracker was given; a chart's rows are a table."""
    charts = {
        f"{key}_table"
        for key, media in tracker.media.items()
        if isinstance(media, LineChart | ConfusionChart)
    }
    rows = {key for row in tracker.history for key in row}
    return charts | rows | set(tracker.media) | set(tracker.summary)


def test_the_workspace_of_training_shows_what_is_logged(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    settings = {
        "model.weights": "random",
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.micro_batch_size": 16,
        "train.ema_decay": 0.9,
    }
    messages = LocalMailbox()
    fit(
        override(Config(), settings),
        store_url=tiny_store(),
        run_url=str(tmp_path),
        world=World(0, 1),
        device=torch.device("cpu"),
        callbacks=Callbacks(on_epoch=messages.put),
    )
    tracker, ended = MemoryTracker(), Future[None]()
    ended.set_result(None)
    Follower(messages, tracker, epochs=1).follow(ended)
    wanted = list_keys(build_views("pneumo", "team")["Train"])
    assert wanted
    only_of_gpus = {"perf/gpu_memory_gb", "perf/gpu_utilisation"}  # see tests/pneumo/test_gpu.py
    assert wanted - list_sent(tracker) == only_of_gpus


def test_the_workspace_of_evaluation_shows_what_is_sent() -> None:
    tracker, found = MemoryTracker(), judged()
    shown = [dataclasses.replace(case(), cam=np.zeros((8, 8), np.float32))]
    pictures = Pictures(
        shown, dict.fromkeys(OUTCOMES, shown), dict.fromkeys(ERRORS, shown), [], sample=shown
    )
    wandb_results.log_evaluation(tracker, found, saliency(0.1, 0.2))
    wandb_results.log_pictures(tracker, pictures, found)
    wanted = list_keys(build_views("pneumo", "team")["Evaluate"])
    assert len(wanted) > 15
    assert wanted - list_sent(tracker) == set()
