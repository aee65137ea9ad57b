"""Arithmetic over imagined clusters: every sample once, the same order on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo.errors import ConfigError
from pneumo.partition import (
    BLOCK,
    World,
    check_batch_size,
    epoch_order,
    evaluation_rows,
    steps_per_epoch,
    train_rows,
)

seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)
ranks = st.integers(1, 64)
sizes = st.integers(0, 3000)


def worlds(size: int) -> list[World]:
    return [World(rank, size) for rank in range(size)]


@pytest.mark.parametrize(("rank", "size"), [(-1, 1), (1, 1), (0, 0), (64, 64)])
def test_a_rank_outside_its_world_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {size}"):
        World(rank, size)


@given(sizes, seeds, epochs)
def test_an_epoch_is_a_permutation_of_the_split(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))
    np.testing.assert_array_equal(order, epoch_order(num_samples, seed=seed, epoch=epoch))


@given(st.integers(200, 1000), seeds, epochs)
def test_every_seed_and_epoch_has_an_order_of_its_own(
    num_samples: int, seed: int, epoch: int
) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    assert (order != epoch_order(num_samples, seed=seed, epoch=epoch + 1)).any()
    assert (order != epoch_order(num_samples, seed=seed + 1, epoch=epoch)).any()


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    expected = [48, 86, 30, 88, 36, 18, 92, 82]
    assert epoch_order(100, seed=7, epoch=3)[:8].tolist() == expected


@given(st.integers(8 * BLOCK, 6000), seeds, epochs)
def test_neighbours_in_an_epoch_come_from_few_blocks(
    num_samples: int, seed: int, epoch: int
) -> None:
    blocks = epoch_order(num_samples, seed=seed, epoch=epoch) // BLOCK
    for block in range(-(-num_samples // BLOCK)):
        places = np.flatnonzero(blocks == block)
        assert places[-1] - places[0] < 8 * BLOCK
    assert sum(len(set(blocks[i : i + 32].tolist())) for i in range(0, 256, 32)) > 8 * 4


# --- training -------------------------------------------------------------------------------------


@given(ranks, st.integers(2, 9), st.integers(0, 500), seeds, epochs)
def test_training_covers_each_sample_at_most_once_in_equal_parts(
    size: int, per_rank: int, more: int, seed: int, epoch: int
) -> None:
    batch_size = size * per_rank
    num_samples = batch_size + more
    check_batch_size(batch_size, size)
    order = epoch_order(num_samples, seed=seed, epoch=epoch)
    seen: list[int] = []
    for step in range(steps_per_epoch(num_samples, batch_size)):
        for world in worlds(size):
            rows = train_rows(order, step, batch_size=batch_size, world=world)
            assert rows.shape == (per_rank,)
            seen.extend(rows.tolist())
    assert len(seen) == len(set(seen)) == num_samples - num_samples % batch_size


@given(st.sampled_from([12, 48, 60, 64, 96]), st.integers(100, 700), seeds, st.data())
def test_what_a_step_trains_on_does_not_depend_on_the_world(
    batch_size: int, num_samples: int, seed: int, data: st.DataObject
) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=0)
    step = data.draw(st.integers(0, steps_per_epoch(num_samples, batch_size) - 1))
    alone = train_rows(order, step, batch_size=batch_size, world=World())
    np.testing.assert_array_equal(alone, order[step * batch_size :][:batch_size])
    for size in range(1, batch_size // 2 + 1):
        if batch_size % size == 0:
            parts = [train_rows(order, step, batch_size=batch_size, world=w) for w in worlds(size)]
            np.testing.assert_array_equal(np.concatenate(parts), alone)


@given(st.integers(101, 127), seeds)
def test_the_remainder_is_another_one_each_epoch(num_samples: int, seed: int) -> None:
    used = steps_per_epoch(num_samples, 64) * 64
    left = {
        tuple(sorted(epoch_order(num_samples, seed=seed, epoch=epoch)[used:])) for epoch in range(5)
    }
    assert len(left) > 1


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 2), (1, 2), (63, 64)])
def test_less_than_one_batch_is_refused(num_samples: int, batch_size: int) -> None:
    message = rf"^train\.batch_size: {batch_size} is more than the {num_samples} samples of the tr"
    with pytest.raises(ConfigError, match=message):
        steps_per_epoch(num_samples, batch_size)


@given(st.integers(2, 300), ranks)
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, num_workers: int) -> None:
    if batch_size % num_workers == 0 and batch_size >= 2 * num_workers:
        check_batch_size(batch_size, num_workers)
        return
    message = rf"^train\.batch_size: {batch_size} does not divide into {num_workers} equal parts"
    with pytest.raises(ConfigError, match=rf"{message}.*change it or cluster\.num_workers"):
        check_batch_size(batch_size, num_workers)


# --- evaluation -----------------------------------------------------------------------------------


@given(sizes, ranks)
def test_evaluation_covers_each_sample_exactly_once(num_samples: int, size: int) -> None:
    parts = [evaluation_rows(num_samples, world) for world in worlds(size)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(num_samples))
    lengths = {len(part) for part in parts}
    assert max(lengths) - min(lengths) <= 1
