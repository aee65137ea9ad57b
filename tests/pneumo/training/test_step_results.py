"""What steps came to, in their order."""

from __future__ import annotations

import math

import pytest
import torch

from pneumo.training.step_results import Outcomes

CPU = torch.device("cpu")


def test_losses_are_summed_and_the_latest_norm_is_kept() -> None:
    outcomes = Outcomes(CPU, loss_sum=2.0, grad_norm=9.0)
    outcomes.put(0, ("a",), torch.tensor([0.5, 0.0]))
    assert outcomes.grad_norm == 9.0
    outcomes.put(1, ("b",), torch.tensor([0.25, 0.0]), torch.tensor(3.0))
    outcomes.put(2, ("c",), torch.tensor([0.25, 0.0]))
    outcomes.drain()
    assert outcomes.losses == [0.5, 0.25, 0.25]
    assert outcomes.loss_sum == 3.0
    assert outcomes.grad_norm == 3.0
    assert not outcomes.should_stop


def test_one_rank_that_wants_to_stop_is_enough() -> None:
    outcomes = Outcomes(CPU)
    outcomes.put(0, ("a",), torch.tensor([0.5, 1.0]))
    outcomes.put(1, ("a",), torch.tensor([0.5, 0.0]))
    assert outcomes.should_stop


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_first_loss_that_is_no_number_is_kept(loss: float) -> None:
    outcomes = Outcomes(CPU)
    for step, value in enumerate([0.5, loss, math.nan]):
        outcomes.put(step, (f"key-{step}",), torch.tensor([value, 0.0]), torch.tensor(math.inf))
    assert outcomes.divergence is not None
    assert (outcomes.divergence.step, outcomes.divergence.keys) == (1, ("key-1",))
    assert str(outcomes.divergence.loss) == str(loss)
    assert outcomes.grad_norm is None
