"""Phantoms, a store and a trained run, made once by the jobs themselves on one Ray cluster."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import evaluate, prepare, train
from jobs.ray_cluster.session import ray_session
from pneumo.config import DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import open_loader
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model
from pneumo.network.scoring import score
from pneumo.training.checkpoints import claim_run, load_checkpoint, read_index, save_checkpoint
from tests.once import make_once
from tests.pneumo.reporting.tracking.wandb_server import backend as backend
from tests.pneumo.reporting.tracking.wandb_server import clean_environment as clean_environment
from tests.processes import new_users

NUM_STUDIES = 90
LARGEST_FLOAT32 = 3.4e38
TRAINING = [
    *("--model.weights", "random"),
    *("--train.batch-size", "16"),
    *("--train.micro-batch-size", "8"),
    *("--train.lr", "1e-3"),
]
SMALL = [*TRAINING, "--tracking.mode", "disabled"]
EVALUATION = [
    *("--evaluate.bootstrap-resamples", "200", "--evaluate.min-patients", "1"),
    *("--tracking.mode", "offline"),
]


class LocalChannel:
    """A channel without Ray."""

    def __init__(self, messages: Iterable[Any] = ()) -> None:
        self.messages = list(messages)

    def put(self, message: Any) -> None:
        self.messages.append(message)

    def take(self, timeout_s: float) -> list[Any]:
        taken, self.messages = self.messages, []
        return taken


@dataclass(frozen=True)
class Prepared:
    """A source and the store that was made of it."""

    source: Path
    store: Path


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One local Ray cluster for every test of the jobs: its start takes seconds."""
    with ray_session():
        yield


@pytest.fixture(scope="session")
def prepared(ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A source and its store; tests must not write into them."""

    def make(folder: Path) -> None:
        source = folder / "phantoms"
        write_phantoms(source, num_studies=NUM_STUDIES, seed=3)
        (source / ".pneumo").mkdir()
        (source / ".pneumo" / "hash_key").write_text("the same split every time")
        flags = ["--source", str(source), "--store", str(folder / "store")]
        assert prepare.main([*flags, "--prepare.image-size", "64"]) == 0

    folder = make_once(tmp_path_factory, "prepared", make)
    return Prepared(folder / "phantoms", folder / "store")


@pytest.fixture(scope="session")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs on two workers, and beside it `said`, what its job has said, and `users`,
    how many processes have imported torchvision for it; tests must not write into it."""

    def make(folder: Path) -> None:
        where = ["--store", str(prepared.store), "--run", str(folder / "run")]
        more = ["--train.epochs", "2", "--cluster.num-workers", "2"]
        shown = ["--tracking.mode", "offline", "--debug"]
        with (
            (folder / "said").open("w") as said,
            redirect_stdout(said),
            redirect_stderr(said),
            new_users("torchvision") as users,
        ):
            code = train.main([*where, *TRAINING, *more, *shown])
        assert code == 0, (folder / "said").read_text()
        (folder / "users").write_text(str(len(users)))

    return make_once(tmp_path_factory, "trained", make) / "run"


@pytest.fixture(scope="session")
def evaluated(prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run evaluated on two workers; tests must not write into it."""

    def make(folder: Path) -> None:
        run = Path(shutil.copytree(trained, folder / "run"))
        where = ["--store", str(prepared.store), "--run", str(run)]
        assert evaluate.main([*where, *EVALUATION, "--cluster.num-workers", "2"]) == 0

    return make_once(tmp_path_factory, "evaluated", make) / "run"


@pytest.fixture(scope="session")
def overflowing(
    prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run like one that diverged: of some studies the logit is infinite, of others a number."""

    def make(folder: Path) -> None:
        checkpoint = load_checkpoint(str(trained), read_index(str(trained)).best)
        weights = dict(checkpoint.scored_model)
        model = build_model(checkpoint.config.model.backbone)
        model.load_state_dict(weights)
        manifest = read_manifest(str(prepared.store))
        store = PreparedStore(str(prepared.store), manifest, DataConfig(cache="stream"))
        test = open_loader(store, "test", world=World(), device="cpu")
        logits = score(model, test.evaluation(batch_size=64)).logits
        scale = 1.2 * LARGEST_FLOAT32 / float(np.abs(logits).max())  # the largest: beyond float32
        for name in ("fc.weight", "fc.bias"):
            weights[name] = (weights[name].double() * scale).float()
        run = str(folder / "run")
        changed = replace(checkpoint, model=weights)
        save_checkpoint(run, changed, attempt=claim_run(run), keep_last=1, finished=True)

    return make_once(tmp_path_factory, "overflowing", make) / "run"


def list_identifiers(source: Path) -> set[str]:
    """What names a study or a patient in a folder of Kaggle's layout: files and the mapping."""
    mapping = source / "pneumonia-challenge-dataset-mappings_2018.json"
    names = {path.stem for path in (source / "stage_2_train_images").glob("*.dcm")}
    for row in json.loads(mapping.read_text()):
        names |= {row["subset_img_id"], row["img_id"], row["img_id"].split("_")[0]}
    return names


def run_module(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` in `cwd`, which must succeed and show no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done
