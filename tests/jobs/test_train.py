import json
import shlex
from concurrent.futures import Future
from pathlib import Path

import pytest

from jobs import train
from jobs.training.job import report_training, stop_training
from pneumo.config import Config
from pneumo.dataset.manifest import read_manifest
from pneumo.training.checkpoints import load_checkpoint, read_index
from tests.jobs.conftest import SMALL, Prepared
from tests.ranks import run_ranks


def test_a_run_leaves_its_configuration_its_epochs_and_its_checkpoints(
    prepared: Prepared, trained: Path
) -> None:
    config = Config.model_validate_json((trained / "config.json").read_text())
    assert config.cluster.num_workers == 2
    epochs = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert all(0 <= row["val/auroc"] <= 1 for row in epochs)
    assert {"train/loss", "val/loss", "val/accuracy", "val/precision", "val/recall"} <= {*epochs[0]}
    index = read_index(str(trained))
    assert index.finished
    assert index.best.val_auroc == max(row["val/auroc"] for row in epochs)
    checkpoint = load_checkpoint(str(trained), index.best)
    assert checkpoint.manifest_digest == read_manifest(str(prepared.store)).digest
    assert checkpoint.config == config


def test_the_next_command_can_be_pasted(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_training(read_index(str(trained)), "runs/of mine", "a store")
    line = capsys.readouterr().err.removeprefix("next: ")
    assert shlex.split(line)[3:] == ["--store", "a store", "--run", "runs/of mine"]


def test_only_the_workers_import_networks(trained: Path) -> None:
    """Neither the actor that keeps messages does nor Ray's controller."""
    assert int((trained.parent / "users").read_text()) <= 2


def test_a_finished_run_is_left_alone(
    prepared: Prepared, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train.main(["--store", str(prepared.store), "--run", str(trained), *SMALL])
    assert code == 2
    assert "finished run of 2 epochs; give another --run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.image-size", "128"], "data.image_size: 128 is above the store's 64"),
        (["--train.batch-size", "960"], "train.batch_size: 960 is more than the"),
        (
            ["--train.batch-size", "24"],
            "train.batch_size: 24 is no multiple of train.micro_batch_size 16",
        ),
        (
            ["--train.batch-size", "16", "--cluster.num-workers", "2"],
            "train.batch_size: 16 is 1 micro-batches of 16, too few for 2 workers",
        ),
        (
            ["--train.batch-size", "40"],
            "train.batch_size: 40 is no multiple of train.micro_batch_size 16",
        ),
        (["--cluster.min-workers", "2"], "min_workers 2 is more than num_workers 1"),
        (
            ["--model.weights", "no/such.pt"],
            "such.pt' is no file; give 'imagenet', 'random', a run, or the",
        ),
        (["--train.lr", "-1"], "train.lr: got '-1'"),
        (["--train.lrr", "1"], "unknown setting --train.lrr"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(
    prepared: Prepared,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    assert train.main(["--store", str(prepared.store), "--run", str(run), *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not run.exists()


def test_more_workers_than_the_cluster_has_is_said_before_the_start(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train.main(
        [
            *("--store", str(prepared.store), "--run", str(tmp_path / "run"), *SMALL),
            *("--cluster.num-workers", "2", "--cluster.cpus-per-worker", "64000"),
        ]
    )
    assert code == 1
    assert "2 workers need 128000 CPU (it has" in capsys.readouterr().err


_LATE_RANK = """
from datetime import timedelta
import time
from jobs.training.trainer import extend_timeout

dist.set_timeout(timedelta(seconds=1))
extend_timeout()
time.sleep(4 * rank)
dist.barrier()
"""


@pytest.mark.slow
def test_ranks_wait_for_one_another_longer_than_for_their_meeting(tmp_path: Path) -> None:
    run_ranks(_LATE_RANK, tmp_path, 2)


def end_with(outcome: bool | Exception) -> Future[bool]:
    training: Future[bool] = Future()
    if isinstance(outcome, Exception):
        training.set_exception(outcome)
    else:
        training.set_result(outcome)
    return training


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (end_with(True), ""),
        (end_with(False), "no checkpoint could be written; training resumes from an earlier one"),
        (end_with(OSError()), "no checkpoint could be written; training resumes from an earlier"),
        (Future(), "train: no checkpoint within 1 s; training resumes from an earlier one"),
    ],
)
def test_who_leaves_learns_whether_there_is_a_checkpoint(
    training: Future[bool], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ordered: list[None] = []
    stop_training(lambda: ordered.append(None), training, timeout_s=1)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("train: interrupted; writing a checkpoint")
    assert len(ordered) == 1
    assert len(rest) == bool(said)
    assert said in "".join(rest)


@pytest.mark.parametrize("present", [[], ["train/000000.tar"]])
def test_a_store_without_a_manifest_is_no_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], present: list[str]
) -> None:
    for name in present:
        (tmp_path / "store" / name).parent.mkdir(parents=True)
        (tmp_path / "store" / name).write_bytes(b"half a store")
    assert train.main(["--store", str(tmp_path / "store"), *SMALL]) == 2
    assert "no manifest.json, so nothing is prepared there" in capsys.readouterr().err
