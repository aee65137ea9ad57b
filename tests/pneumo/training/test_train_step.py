"""A step on several ranks is the step on one: in float64, where rounding does not blur it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

pytestmark = pytest.mark.processors

_RANK = """
from pneumo.config import TrainConfig
from pneumo.training.train_step import Learner
from pneumo.loading.loader import Batch
from tests.networks import TinyNetwork
from pneumo.loading.sample_order import micro_batches

config = TrainConfig(batch_size=24, micro_batch_size=6, optimizer="sgd")
torch.manual_seed(0)
model = TinyNetwork().double()
learner = Learner(model, config, pos_weight=2.0, seed=0, world=world, device=torch.device("cpu"))
learner.statistics.momentum = learner.statistics.momentum.double()
mine = micro_batches(24, 6, world)
here = slice(mine[0] * 6, (mine[-1] + 1) * 6)
generator = torch.Generator().manual_seed(1)
steps = []
for step in range(3):
    images = torch.randn(24, 1, 64, 64, generator=generator, dtype=torch.float64)
    targets = (torch.rand(24, generator=generator) > 0.5).double()
    batch = Batch(images[here], targets[here], ("key",) * len(images[here]))
    outcome = learner.learn(batch, epoch=0, step=step, lr=1e-3, with_norm=True)
    steps.append([float(outcome[0]), float(outcome[3])])
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save({"steps": steps, "weights": weights, "running": learner.statistics.running,
            "state": [b.clone() for b in model.buffers()]}, folder / f"{size}-{rank}.pt")
"""


def learn(folder: Path, size: int) -> list[dict[str, Any]]:
    run_ranks(_RANK, folder, size)
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


_COMPILED_RANK = """
from pneumo.config import TrainConfig
from pneumo.training.train_step import Learner
from pneumo.loading.loader import Batch
from tests.networks import TinyNetwork
from pneumo.loading.sample_order import micro_batches

def learn(compiled):
    config = TrainConfig(batch_size=16, micro_batch_size=4, optimizer="sgd", compile=compiled)
    torch.manual_seed(0)
    model = TinyNetwork()
    learner = Learner(model, config, pos_weight=2.0, seed=0, world=world,
                      device=torch.device("cpu"))
    if compiled:  # as the setting does, but without a C compiler
        model.compile(backend="aot_eager")
    learner.network.train()
    mine = micro_batches(16, 4, world)
    here = slice(mine[0] * 4, (mine[-1] + 1) * 4)
    generator = torch.Generator().manual_seed(1)
    outcomes = []
    for step in range(3):
        images = torch.randn(16, 1, 64, 64, generator=generator)[here]
        batch = Batch(images, torch.arange(16)[here] % 2.0, ("key",) * len(images))
        outcome = learner.learn(batch, epoch=0, step=step, lr=1e-3, with_norm=True)
        outcomes.append([float(outcome[0]), float(outcome[3])])
    return outcomes

(folder / f"compiled-{rank}.json").write_text(json.dumps([learn(False), learn(True)]))
"""


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(_COMPILED_RANK, tmp_path, 2)
    told = [json.loads((tmp_path / f"compiled-{rank}.json").read_text()) for rank in range(2)]
    plain, compiled = (torch.tensor(outcomes) for outcomes in told[0])
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)
    assert [step[0] for step in told[1][1]] == [step[0] for step in told[0][1]]


@pytest.mark.slow
def test_losses_gradients_weights_and_running_statistics_are_those_of_one_rank(
    tmp_path: Path,
) -> None:
    (alone,) = learn(tmp_path, 1)
    for size in (2, 3, 4):
        for rank in learn(tmp_path, size):
            # Losses are computed in float32, whatever the network is in.
            torch.testing.assert_close(
                torch.tensor(rank["steps"]), torch.tensor(alone["steps"]), rtol=1e-5, atol=1e-6
            )
            for name in ("weights", "running"):
                torch.testing.assert_close(rank[name], alone[name], rtol=1e-5, atol=1e-7)
            for buffer, expected in zip(rank["state"], alone["state"], strict=True):
                torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-7)
