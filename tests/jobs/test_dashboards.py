"""The workspaces show what the jobs send, and nothing else."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.evaluation.evaluated_run import EvaluatedRun
from jobs.evaluation.wandb_results import read_evaluation
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.evaluation.shown_studies import ERRORS, OUTCOMES
from pneumo.loading.sample_order import World
from pneumo.reporting.figures.case_pictures import Pictures
from pneumo.reporting.tracking.dashboards import build_views, describe_view
from pneumo.reporting.tracking.media import ConfusionChart, LineChart
from pneumo.reporting.tracking.tracked_run import TrackedRun
from pneumo.reporting.tracking.training_run import read_training
from pneumo.training.callbacks import Callbacks
from pneumo.training.fit import fit
from tests.conftest import StoreMaker
from tests.jobs.evaluation.test_wandb_results import case, leave
from tests.jobs.evaluation.test_wandb_results import subject as subject
from tests.networks import build_tiny
from tests.pneumo.reporting.page.test_degenerate import saliency


def list_keys(view: Any) -> set[str]:
    """What the panels of a workspace are told to show."""

    told_in = ("y", "media_keys")

    def walk(part: Any, name: str = "") -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from walk(value, key)
        elif isinstance(part, list):
            for value in part:
                yield from walk(value, name)
        elif isinstance(part, str) and (name in told_in or part[:5] == "eval/"):
            yield part

    return set(walk(describe_view(view))) - {"y"}  # a chart's field, and the name of its column


def list_told(run: TrackedRun | None) -> set[str]:
    """Under which keys W&B has what it is told; a chart's rows are a table."""
    assert run is not None
    charts = {
        f"{key}_table"
        for key, media in run.media.items()
        if isinstance(media, LineChart | ConfusionChart)
    }
    rows = {key for row in run.history for key in row}
    return charts | rows | set(run.media) | set(run.summary)


def test_the_workspace_of_training_shows_what_is_told(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    settings = {
        "model.weights": "random",
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.micro_batch_size": 16,
        "train.ema_decay": 0.9,
    }
    config = override(Config(), settings)
    (tmp_path / "config.json").write_text(config.to_json())
    fit(
        config,
        store_url=tiny_store(),
        run_url=str(tmp_path),
        world=World(0, 1),
        device=torch.device("cpu"),
        callbacks=Callbacks(),
        build_network=build_tiny,
    )
    wanted = list_keys(build_views("pneumo", "team")["Train"])
    assert wanted
    # See tests/pneumo/test_gpu.py; and logits of so few studies may have no slope.
    not_here = {"perf/gpu_memory_gb", "perf/gpu_utilisation", "val/calibration_slope"}
    assert wanted - list_told(read_training(str(tmp_path))) <= not_here


def test_the_workspace_of_evaluation_shows_what_is_told(
    subject: EvaluatedRun, tmp_path: Path
) -> None:
    shown = [dataclasses.replace(case(), cam=np.zeros((8, 8), np.float32))]
    pictures = Pictures(
        shown, dict.fromkeys(OUTCOMES, shown), dict.fromkeys(ERRORS, shown), [], sample=shown
    )
    found = saliency(0.1, 0.2)
    run = leave(
        tmp_path / "run", subject, pictures=pictures, saliency={"val": found, "test": found}
    )
    wanted = list_keys(build_views("pneumo", "team")["Evaluate"])
    assert len(wanted) > 15
    assert wanted - list_told(read_evaluation(str(run))) == set()
