"""Times of steps, and when waiting for data is worth a line."""

import time
from collections.abc import Iterator

import pytest

from pneumo.training.throughput import SlowData, StepTimes


def make_times(*steps: tuple[float, float]) -> StepTimes:
    """Of steps of (seconds waited, seconds altogether)."""
    times = StepTimes(8)
    times.waits_s = [wait for wait, _ in steps]
    times.steps_s = [total for _, total in steps]
    return times


def test_waiting_and_working_are_told_apart() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    times = StepTimes(8)
    for _ in times.watch(batches()):
        time.sleep(0.01)
    found = times.read()
    assert all(0.05 <= wait < step for wait, step in zip(times.waits_s, times.steps_s, strict=True))
    assert found["data_wait"] == pytest.approx(sum(times.waits_s) / sum(times.steps_s))
    assert found["images_per_s"] == pytest.approx(24 / sum(times.steps_s))
    assert times.read(3)["images_per_s"] is None


def test_the_first_step_which_may_read_the_split_does_not_count() -> None:
    assert SlowData().add(make_times((30.0, 31.0), (0.0, 1.0))) is None


def test_a_run_of_one_epoch_is_told() -> None:
    found = SlowData().add(make_times((0.0, 1.0), *[(0.2, 1.0)] * 10))
    assert found == pytest.approx(0.2)


def test_short_epochs_add_up_and_are_told_once_a_second_is_lost() -> None:
    slow = SlowData()
    slow.add(make_times((0.0, 0.1)))
    said = [slow.add(make_times((0.3, 1.0))) for _ in range(8)]
    assert [share is not None for share in said] == [False, False, False, True] * 2


def test_a_share_or_a_time_that_is_small_is_not_told() -> None:
    slow = SlowData()
    assert [slow.add(make_times((0.04, 1.0))) for _ in range(50)] == [None] * 50
    quick = SlowData()
    assert quick.add(make_times((0.0, 0.1), (0.9, 1.0))) is None


def test_what_was_fast_for_long_does_not_hide_what_is_slow_now() -> None:
    slow = SlowData()
    for _ in range(100):
        assert slow.add(make_times((0.0, 100.0))) is None
    assert slow.add(make_times((2.0, 10.0))) == pytest.approx(0.2)


def test_what_tells_a_gpus_utilisation_is_installed() -> None:
    # torch.cuda.utilization gives up without it, and the log would say nothing.
    import pynvml

    assert callable(pynvml.nvmlDeviceGetUtilizationRates)
