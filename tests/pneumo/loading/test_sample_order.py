"""Arithmetic over imagined clusters: every sample once, the same order on any number of ranks."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumo.config_layers import check_batch_size
from pneumo.errors import ConfigError
from pneumo.loading.sample_order import (
    Rows,
    World,
    epoch_order,
    evaluation_rows,
    steps_per_epoch,
    train_rows,
)
from tests.waiting import count_calls

pytestmark = pytest.mark.processors

seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)
ranks = st.integers(1, 64)
batch_sizes = st.integers(2, 300)


def shard_blocks(samples: int, samples_per_shard: int, block: int = 64) -> list[int]:
    """Sizes of the blocks of shards: full ones, and what is left at the end of each shard."""
    sizes = []
    while samples > 0:
        left = min(samples, samples_per_shard)
        samples -= left
        sizes += [block] * (left // block) + [left % block] * (left % block > 0)
    return sizes


stores = st.builds(
    shard_blocks, st.integers(0, 3000), st.integers(1, 1100), st.just(64)
) | st.lists(st.integers(1, 64), max_size=40)


def worlds(size: int) -> list[World]:
    return [World(rank, size) for rank in range(size)]


@pytest.mark.parametrize(("rank", "size"), [(-1, 1), (1, 1), (0, 0), (64, 64)])
def test_a_rank_outside_its_world_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {size}"):
        World(rank, size)


@pytest.mark.parametrize("local_size", [0, 5])
def test_a_machine_has_one_to_all_of_the_ranks(local_size: int) -> None:
    assert World(3, 4, 4).local_size == 4
    with pytest.raises(ValueError, match=f"{local_size} of 4 ranks on one machine"):
        World(3, 4, local_size)


# --- the order ------------------------------------------------------------------------------------


@given(stores, batch_sizes, seeds, epochs)
def test_an_epoch_is_a_permutation_of_the_split(
    sizes: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = epoch_order(sizes, batch_size=batch_size, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(sum(sizes)))
    again = epoch_order(tuple(sizes), batch_size=batch_size, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(order, again)


@given(st.integers(200, 1000), batch_sizes, seeds, epochs)
def test_every_seed_and_epoch_has_an_order_of_its_own(
    num_samples: int, batch_size: int, seed: int, epoch: int
) -> None:
    sizes = shard_blocks(num_samples, 1024)

    def order(seed: int, epoch: int) -> Rows:
        return epoch_order(sizes, batch_size=batch_size, seed=seed, epoch=epoch)

    assert (order(seed, epoch) != order(seed, epoch + 1)).any()
    assert (order(seed, epoch) != order(seed + 1, epoch)).any()


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    expected = [44, 47, 57, 22, 10, 48, 19, 29, 42, 6, 14, 39]
    assert epoch_order([64, 36], batch_size=8, seed=7, epoch=3)[:12].tolist() == expected


def take_by_lanes(sizes: list[int], batch_size: int, order: list[int]) -> list[int]:
    """The docstring's construction, spelt out, from the sequence that `order` shows."""
    steps = len(order) // batch_size
    widths = [4] * (batch_size // 4) + [batch_size % 4]
    lanes: list[list[int]] = [[] for _ in widths]
    for step in range(steps):
        batch = order[step * batch_size :][:batch_size]
        for lane, width in zip(lanes, widths, strict=True):
            lane += batch[:width]
            batch = batch[width:]
    return [row for lane in lanes for row in lane] + order[steps * batch_size :]


@given(stores, batch_sizes, seeds, epochs)
def test_the_lanes_one_after_the_other_are_whole_blocks(
    sizes: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = epoch_order(sizes, batch_size=batch_size, seed=seed, epoch=epoch).tolist()
    sequence = take_by_lanes(sizes, batch_size, order)
    blocks = np.searchsorted(np.cumsum(sizes), sequence, side="right")
    changes = 1 + np.count_nonzero(np.diff(blocks))
    assert changes == max(len(sizes), 1)


def test_the_first_places_are_everybodys_equally_often() -> None:
    sizes = [64, 64, 64, 64]
    first = [epoch_order(sizes, batch_size=4, seed=0, epoch=e)[0] for e in range(2000)]
    blocks = np.bincount(np.array(first) // 64, minlength=4)
    inside = np.bincount(np.array(first) % 64, minlength=64)
    # Five standard deviations of a binomial count.
    assert np.abs(blocks - 500).max() < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert np.abs(inside - 2000 / 64).max() < 5 * (2000 / 64) ** 0.5


def test_a_batch_is_mixed_from_a_fourth_as_many_blocks() -> None:
    order = epoch_order([64] * 100, batch_size=64, seed=0, epoch=0)
    for step in range(100):
        rows = train_rows(order, step, batch_size=64, world=World())
        assert 16 <= len(np.unique(rows // 64)) <= 17  # 17: a lane within its change of blocks


@pytest.mark.parametrize("samples_per_shard", [1024, 1000])
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_ranks_share_at_most_the_blocks_where_they_meet(size: int, samples_per_shard: int) -> None:
    sizes = shard_blocks(18_700, samples_per_shard)
    order = epoch_order(sizes, batch_size=256, seed=3, epoch=1)
    read = 0
    for world in worlds(size):
        rows = [train_rows(order, step, batch_size=256, world=world) for step in range(73)]
        read += len(np.unique(np.searchsorted(np.cumsum(sizes), np.concatenate(rows), "right")))
    assert read <= len(sizes) + size - 1


def test_an_order_of_100_000_is_made_by_as_many_calls_as_one_of_1000() -> None:
    """There is no loop over samples in Python."""
    one, other = (
        count_calls(
            partial(epoch_order, shard_blocks(number, 1024), batch_size=64, seed=0, epoch=1)
        )
        for number in (1000, 100_000)
    )
    assert one == other


# --- training -------------------------------------------------------------------------------------


@given(ranks, st.integers(2, 9), st.integers(0, 500), st.integers(1, 64), seeds, epochs)
def test_training_covers_each_sample_at_most_once_in_equal_parts(
    size: int, per_rank: int, more: int, block: int, seed: int, epoch: int
) -> None:
    batch_size = size * per_rank
    num_samples = batch_size + more
    check_batch_size(batch_size, per_rank, size)
    sizes = shard_blocks(num_samples, 1024, block)
    order = epoch_order(sizes, batch_size=batch_size, seed=seed, epoch=epoch)
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
    sizes = shard_blocks(num_samples, 300)
    order = epoch_order(sizes, batch_size=batch_size, seed=seed, epoch=0)
    step = data.draw(st.integers(0, steps_per_epoch(num_samples, batch_size) - 1))
    alone = train_rows(order, step, batch_size=batch_size, world=World())
    np.testing.assert_array_equal(alone, order[step * batch_size :][:batch_size])
    micro = data.draw(st.sampled_from([2, 3, 4, 6, 12]).filter(lambda m: batch_size % m == 0))
    for size in range(1, batch_size // micro + 1):
        check_batch_size(batch_size, micro, size)
        parts = [
            train_rows(order, step, batch_size=batch_size, micro_batch_size=micro, world=w)
            for w in worlds(size)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), alone)
        assert min(map(len, parts)) >= micro
        assert max(map(len, parts)) - min(map(len, parts)) in (0, micro)
        assert not any(len(part) % micro for part in parts)


@given(st.integers(101, 127), seeds)
def test_the_remainder_is_another_one_each_epoch(num_samples: int, seed: int) -> None:
    sizes = shard_blocks(num_samples, 1024, block=8)
    left = {
        tuple(sorted(epoch_order(sizes, batch_size=64, seed=seed, epoch=epoch)[64:]))
        for epoch in range(5)
    }
    assert len(left) > 1


def test_no_sample_is_always_left_out() -> None:
    sizes = shard_blocks(1000, 1024)
    seen: set[int] = set()
    for epoch in range(12):
        seen |= set(epoch_order(sizes, batch_size=300, seed=1, epoch=epoch)[:900].tolist())
    assert len(seen) == 1000


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 2), (1, 2), (63, 64)])
def test_less_than_one_batch_is_refused(num_samples: int, batch_size: int) -> None:
    message = rf"^train\.batch_size: {batch_size} is more than the {num_samples} samples of the tr"
    with pytest.raises(ConfigError, match=message):
        steps_per_epoch(num_samples, batch_size)


@given(st.integers(2, 300), st.integers(2, 70), ranks)
def test_a_batch_that_does_not_divide_is_refused(
    batch_size: int, micro_batch_size: int, num_workers: int
) -> None:
    if batch_size % micro_batch_size:
        message = (
            rf"^train\.batch_size: {batch_size} is no multiple of train\.micro_batch_size "
            rf"{micro_batch_size}; change one"
        )
    elif batch_size // micro_batch_size < num_workers:
        message = (
            rf"^train\.batch_size: {batch_size} is \d+ micro-batches of {micro_batch_size}, too "
            rf"few for {num_workers} workers; raise it"
        )
    else:
        check_batch_size(batch_size, micro_batch_size, num_workers)
        return
    with pytest.raises(ConfigError, match=message):
        check_batch_size(batch_size, micro_batch_size, num_workers)


# --- evaluation -----------------------------------------------------------------------------------


@given(stores, ranks)
def test_evaluation_covers_each_sample_exactly_once_in_whole_blocks(
    sizes: list[int], size: int
) -> None:
    parts = [evaluation_rows(sizes, world) for world in worlds(size)]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(sum(sizes)))
    bounds = {0, *np.cumsum(sizes).tolist()}
    for part in parts:
        assert part.dtype == np.int64
        if len(part):
            assert {int(part[0]), int(part[-1]) + 1} <= bounds
        assert abs(len(part) - sum(sizes) / size) < max(sizes, default=0) + 1
