"""What is kept of a run, and when."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pneumo.config import Config
from pneumo.errors import RunError
from pneumo.training.checkpoint_writer import Keeper, read_history
from pneumo.training.checkpoints import Checkpoint, claim_run, read_index


def make_checkpoint(epoch: int, step: int = 0) -> Checkpoint:
    return Checkpoint(
        model={},
        optimizer={},
        epoch=epoch,
        step=step,
        config=Config(),
        manifest_digest="a" * 64,
        image_size=32,
        mean=0.5,
        std=0.2,
        history=tuple({"epoch": n, "val/auroc": 0.5} for n in range(1, epoch + 1)),
        initialisation="random",
        code_version="0",
    )


def make_keeper(run_url: str) -> Keeper:
    return Keeper(run_url, claim_run(run_url), keep_last=2, tell=lambda line: None)


def test_metrics_and_checkpoints_are_kept_and_each_place_once(tmp_path: Path) -> None:
    keeper = make_keeper(str(tmp_path))
    taken: list[tuple[int, int]] = []

    def save(epoch: int, step: int = 0, **marks: bool) -> None:
        def take() -> Checkpoint:
            taken.append((epoch, step))
            return make_checkpoint(epoch, step)

        keeper.save((epoch, step), take, **marks)

    for _ in range(2):
        save(0, 5)
    save(1)
    save(1, wait=True)
    assert taken == [(0, 5), (1, 0)]
    assert [(e.epoch, e.step) for e in read_index(str(tmp_path)).entries] == [(1, 0)]
    assert read_history(str(tmp_path)) == [{"epoch": 1, "val/auroc": 0.5}]
    save(2, finished=True, wait=True)
    assert read_index(str(tmp_path)).finished
    keeper.close()


def test_a_run_that_goes_on_is_not_kept_again_where_it_begins(tmp_path: Path) -> None:
    keeper = Keeper(str(tmp_path), "a", keep_last=1, tell=lambda line: None, begun_at=(1, 7))
    keeper.save((1, 7), lambda: pytest.fail("it is kept"), wait=True)
    keeper.close()


def test_only_what_would_take_a_minute_to_repeat_is_kept_before_it_is_validated(
    tmp_path: Path,
) -> None:
    keeper = make_keeper(str(tmp_path))
    assert not keeper.is_worth_saving
    keeper.kept_s = time.monotonic() - 61
    assert keeper.is_worth_saving
    keeper.save((1, 0), lambda: make_checkpoint(1), wait=True)
    assert not keeper.is_worth_saving
    keeper.close()


def test_nothing_is_written_into_a_run_that_another_attempt_has_taken(tmp_path: Path) -> None:
    lost = make_keeper(str(tmp_path))
    keeper = make_keeper(str(tmp_path))
    keeper.save((2, 0), lambda: make_checkpoint(2), finished=True, wait=True)
    with pytest.raises(RunError, match="another attempt has taken this run over"):
        lost.save((1, 0), lambda: make_checkpoint(1), wait=True)
    assert len(read_history(str(tmp_path))) == 2
    for each in (lost, keeper):
        each.close()
