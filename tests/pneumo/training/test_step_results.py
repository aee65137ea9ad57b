"""What steps came to, in their order."""

import math

import pytest
import torch
from torch import Tensor

from pneumo.training.step_results import EpochTotals, StepResults

CPU = torch.device("cpu")


def values(loss: float, *, stops: float = 0.0, norm: float = math.nan) -> Tensor:
    return torch.tensor([loss, stops, 8.0, norm])


def test_losses_and_samples_are_summed_and_the_latest_norm_is_kept() -> None:
    totals = EpochTotals(step=3, loss=2.0, samples=24, grad_norm=9.0)
    results = StepResults(CPU, totals)
    results.put(3, ("a",), values(0.5))
    assert totals.grad_norm == 9.0
    results.put(4, ("b",), values(0.25, norm=3.0))
    results.put(5, ("c",), values(0.25))
    results.read_all()
    assert results.losses == [0.5, 0.25, 0.25]
    assert totals == EpochTotals(step=6, loss=3.0, samples=48, grad_norm=3.0)
    assert not results.should_stop


def test_one_rank_that_wants_to_stop_is_enough() -> None:
    results = StepResults(CPU, EpochTotals())
    results.put(0, ("a",), values(0.5, stops=1.0))
    results.put(1, ("a",), values(0.5))
    assert results.should_stop


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_first_loss_that_is_not_finite_is_kept(loss: float) -> None:
    results = StepResults(CPU, EpochTotals())
    for step, value in enumerate([0.5, loss, math.nan]):
        results.put(step, (f"key-{step}",), values(value, norm=math.inf))
    assert results.divergence is not None
    assert (results.divergence.step, results.divergence.keys) == (1, ("key-1",))
    assert str(results.divergence.loss) == str(loss)
    assert results.totals.grad_norm is None
