"""A digest of what was fed tells every difference, and none between clusters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from pneumo.loading.sample_order import World, micro_batches
from pneumo.training.tally import Tally

CPU = torch.device("cpu")
SIZE = 3


def feed(steps: Sequence[Sequence[str]], world: World | None = None, epoch: int = 0) -> Tally:
    """What one rank of an epoch of these steps counts."""
    tally, world = Tally(), world or World()
    for step, keys in enumerate(steps):
        mine = micro_batches(len(keys), SIZE, world)
        tally = tally.add(
            keys[mine.start * SIZE : mine.stop * SIZE],
            epoch=epoch,
            step=step,
            micro_batches=mine,
            micro_batch_size=SIZE,
        )
    return tally


STEPS = [[f"{step}-{i}" for i in range(12)] for step in range(4)]


@given(st.integers(1, 4))
def test_ranks_add_up_to_one(size: int) -> None:
    parts = [feed(STEPS, World(rank, size)) for rank in range(size)]
    assert sum(part.samples for part in parts) == feed(STEPS).samples == 48
    assert sum(part.digest for part in parts) % 2**48 == feed(STEPS).digest


@given(st.data())
def test_any_other_study_place_or_order_shows(data: st.DataObject) -> None:
    steps = [list(keys) for keys in STEPS]
    places = st.tuples(st.integers(0, 3), st.integers(0, 11))
    (i, j), (k, m) = data.draw(st.tuples(places, places).filter(lambda pair: pair[0] != pair[1]))
    if data.draw(st.booleans()):
        steps[i][j], steps[k][m] = steps[k][m], steps[i][j]
    else:
        steps[i][j] = steps[k][m]  # one lost, another fed twice
    assert feed(steps) != feed(STEPS)
    assert feed(steps).digest != feed(STEPS).digest


def test_epochs_differ_and_one_process_is_its_own_total() -> None:
    assert feed(STEPS, epoch=1).digest != feed(STEPS).digest
    tally = feed(STEPS)
    assert tally.total(World(), CPU) is tally
    assert float(tally.digest) == tally.digest < 2**48
