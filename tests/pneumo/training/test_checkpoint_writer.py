"""What is kept of a run, and when."""

import threading
import time
from pathlib import Path

import pytest

from pneumo.config import Config
from pneumo.errors import CheckpointError, RunError, StorageError
from pneumo.training.checkpoint_writer import BackgroundWriter, RunWriter, read_history
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


def make_writer(run_url: str) -> RunWriter:
    return RunWriter(run_url, claim_run(run_url), keep_last=2, tell=lambda line: None)


def test_metrics_and_checkpoints_are_kept_and_each_place_once(tmp_path: Path) -> None:
    writer = make_writer(str(tmp_path))
    taken: list[tuple[int, int]] = []

    def save(epoch: int, step: int = 0, **marks: bool) -> None:
        def take() -> Checkpoint:
            taken.append((epoch, step))
            return make_checkpoint(epoch, step)

        writer.save((epoch, step), take, **marks)

    for _ in range(2):
        save(0, 5)
    save(1)
    save(1, wait=True)
    assert taken == [(0, 5), (1, 0)]
    assert [(e.epoch, e.step) for e in read_index(str(tmp_path)).entries] == [(1, 0)]
    assert read_history(str(tmp_path)) == [{"epoch": 1, "val/auroc": 0.5}]
    save(2, finished=True, wait=True)
    assert read_index(str(tmp_path)).finished
    writer.close()


def test_a_run_that_goes_on_is_not_kept_again_where_it_begins(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path), "a", keep_last=1, tell=lambda line: None, saved_at=(1, 7))
    writer.save((1, 7), lambda: pytest.fail("it is kept"), wait=True)
    writer.close()


def test_only_what_would_take_a_minute_to_repeat_is_kept_before_it_is_validated(
    tmp_path: Path,
) -> None:
    writer = make_writer(str(tmp_path))
    assert not writer.is_save_due
    writer.saved_s = time.monotonic() - 61
    assert writer.is_save_due
    writer.save((1, 0), lambda: make_checkpoint(1), wait=True)
    assert not writer.is_save_due
    writer.close()


def test_nothing_is_written_into_a_run_that_another_attempt_has_taken(tmp_path: Path) -> None:
    lost = make_writer(str(tmp_path))
    writer = make_writer(str(tmp_path))
    writer.save((2, 0), lambda: make_checkpoint(2), finished=True, wait=True)
    with pytest.raises(RunError, match="another attempt has claimed this run"):
        lost.save((1, 0), lambda: make_checkpoint(1), wait=True)
    assert len(read_history(str(tmp_path))) == 2
    for each in (lost, writer):
        each.close()


# --- in the background ----------------------------------------------------------------------------


def test_writing_does_not_hold_up_training_and_goes_one_at_a_time() -> None:
    written: list[int] = []
    go = threading.Event()
    writer = BackgroundWriter(lambda line: None)
    writer.submit(lambda: written.append(int(go.wait(20))))
    assert written == []
    second = threading.Thread(target=writer.submit, args=(lambda: written.append(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "a second one waits for the first"
    go.set()
    second.join()
    writer.flush()
    assert written == [1, 2]
    writer.close()


def store_is_away() -> None:
    raise StorageError("storage: s3://bucket/run: tried again for 120 s")


def test_an_object_store_that_is_away_is_outlived_but_not_for_ever() -> None:
    told: list[str] = []
    written: list[int] = []
    writer = BackgroundWriter(told.append)
    warning = "warning: a checkpoint could not be written, training continues: storage: s3://bucket"
    for _ in range(2):
        writer.submit(store_is_away)
    writer.submit(lambda: written.append(1))
    assert [line[: len(warning)] for line in told] == [warning, warning]
    writer.flush()
    assert written == [1]
    for _ in range(3):  # counted anew: one was written in between
        writer.submit(store_is_away)
    with pytest.raises(StorageError, match="tried again for 120 s"):
        writer.submit(store_is_away)
    writer.close()


def test_what_waiting_does_not_mend_is_raised_as_soon_as_it_is_known() -> None:
    told: list[str] = []
    begun, go = threading.Event(), threading.Event()
    writer = BackgroundWriter(told.append)

    def fill() -> None:
        begun.set()
        go.wait(20)
        raise CheckpointError("no checkpoint could be written: No space left on device")

    writer.submit(fill)
    begun.wait(20)
    writer.check()  # still under way
    go.set()

    def keep_checking() -> None:
        for _ in range(200):
            writer.check()
            time.sleep(0.05)

    with pytest.raises(CheckpointError, match="No space left"):
        keep_checking()
    writer.close()
    assert told == []


def test_the_last_write_is_waited_for_and_its_failure_is_an_error() -> None:
    told: list[str] = []
    writer = BackgroundWriter(told.append)
    writer.submit(store_is_away)
    with pytest.raises(StorageError):
        writer.flush()
    writer.submit(store_is_away)
    writer.close()
    assert "the last checkpoint could not be written" in told[-1]
