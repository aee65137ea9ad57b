"""Training against plain torch; a run cut anywhere goes on as if it had not been."""

import itertools
import json
import math
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pneumo import storage
from pneumo.config import Config, TrainConfig
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    PreemptedError,
    RunError,
    StoreError,
)
from pneumo.loading.loader import Batch
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model, initialise
from pneumo.training.callbacks import Callbacks, Epoch, Start, StepProgress
from pneumo.training.checkpoints import (
    Checkpoint,
    claim_run,
    find_index,
    load_checkpoint,
    read_index,
    save_checkpoint,
)
from pneumo.training.fit import fit
from pneumo.training.optimisation import autocast_dtype, build_optimizer, learning_rate
from pneumo.training.preconditions import check_run, resolve_pos_weight
from pneumo.training.train_step import Learner
from tests.networks import TinyNetwork, build_tiny
from tests.ranks import run_ranks

StoreMaker = Callable[..., str]
History = list[dict[str, float | None]]

CPU = torch.device("cpu")
TIMES = ("images_per_s", "epoch_s", "data_wait", "step_p50_s", "step_p95_s")
SMALL = override(
    Config(seed=2),
    {
        "model.weights": "random",
        "train.batch_size": 12,
        "train.micro_batch_size": 3,
        "train.lr": 1e-3,
        "train.epochs": 2,
    },
)


@pytest.fixture(scope="module")
def store_url(tiny_store: StoreMaker) -> str:
    return tiny_store(train=51, val=13)


@pytest.fixture
def run_url() -> Iterator[str]:
    """In memory: every checkpoint is 134 MB."""
    memory = fsspec.filesystem("memory")
    yield "memory://runs"
    if memory.exists("/runs"):
        memory.rm("/runs", recursive=True)


def run(
    config: Config,
    store_url: str,
    run_url: str,
    build_network: Callable[[str], nn.Module] = build_tiny,
    **callbacks: Any,
) -> History:
    return fit(
        config,
        store_url=store_url,
        run_url=run_url,
        world=World(),
        device=CPU,
        callbacks=Callbacks(**callbacks),
        build_network=build_network,
    )


def without_times(history: Any) -> list[dict[str, float | None]]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in history]


def newest(run_url: str) -> Checkpoint:
    return load_checkpoint(run_url, read_index(run_url).latest)


def flat(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in state.values()])


class PowerCutError(Exception):
    """Ends a run in the middle."""


# --- one step -------------------------------------------------------------------------------------


def make_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 1, 32, 32, generator=generator)
    return Batch(images, (torch.arange(size) % 3 == 0).float(), tuple(map(str, range(size))))


def make_model() -> nn.Module:
    model = TinyNetwork()
    initialise(model, SMALL.model, seed=4)
    return model.train()


def make_learner(model: nn.Module, **changes: Any) -> Learner:
    settings = {"batch_size": 6, "micro_batch_size": 3, "lr": 1e-3} | changes
    return Learner(
        model,
        TrainConfig.model_validate(settings),
        pos_weight=2.5,
        seed=0,
        world=World(),
        device=CPU,
    )


@pytest.mark.processors
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_is_that_of_plain_torch(optimizer: str, clip: float | None) -> None:
    batch, ours, plain = make_batch(), make_model().double(), make_model().double()
    batch = Batch(batch.images.double(), batch.targets.double(), batch.keys)
    rate = 1e-2 if optimizer == "sgd" else 1e-3
    learner = make_learner(
        ours,
        optimizer=optimizer,
        clip_norm=clip,
        weight_decay=0.01,
        ema_decay=0.1,
    )
    learner.pos_weight = learner.pos_weight.double()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    extra: dict[str, Any] = {"momentum": 0.9} if optimizer == "sgd" else {}
    plain_optimizer = kind(plain.parameters(), lr=rate, weight_decay=0.01, **extra)
    averaged = flat(dict(plain.named_parameters())).detach()
    for step in range(2):
        loss, _, samples, found_norm = learner.learn(batch, epoch=0, step=step, lr=rate)
        assert samples == 6
        buffers = {n: b.clone() for n, b in plain.named_buffers()}
        plain_optimizer.zero_grad()
        losses: list[float] = []
        means = []
        for part in (slice(0, 3), slice(3, 6)):
            plain.load_state_dict(buffers, strict=False)
            p = plain(batch.images[part])[:, 0].sigmoid()
            y = batch.targets[part]
            expected = -(2.5 * y * p.log() + (1 - y) * (1 - p).log()).mean()
            (expected / 2).backward()
            losses.append(float(expected.detach()))
            means.append({n: b.clone() for n, b in plain.named_buffers()})
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(plain.parameters(), clip)
            assert float(found_norm) == pytest.approx(float(norm), rel=1e-2)
            assert norm > clip
        plain_optimizer.step()
        joint = {n: (means[0][n] + means[1][n]) / 2 for n in buffers}
        joint = {n: v.to(buffers[n].dtype) for n, v in joint.items()}
        plain.load_state_dict(joint, strict=False)
        decay = min(0.1, (2 + step) / (11 + step))
        weights = flat(dict(plain.named_parameters())).detach()
        averaged = decay * averaged + (1 - decay) * weights
        assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-3)
    first = flat(make_model().double().state_dict())
    moved = (first - flat(plain.state_dict())).norm()
    assert (flat(ours.state_dict()) - flat(plain.state_dict())).norm() < 1e-3 * moved
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.state_dict()[name], buffer, rtol=1e-3, atol=1e-4)
    assert learner.average is not None
    ema = flat(dict(learner.average.module.named_parameters()))
    assert (ema - averaged).norm() < 0.02 * moved


class _OwnNetwork(nn.Module):
    """Normalised and random in other dimensions than ours."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout2d(dropout), nn.ReLU())
        self.norm = nn.BatchNorm1d(4)
        self.fixed = nn.BatchNorm1d(4, track_running_stats=False)
        self.fc = nn.Linear(4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.body(images).mean((2, 3))
        logits: torch.Tensor = self.fc(self.fixed(self.norm(pooled)))
        return logits


def test_networks_of_ones_own_get_the_statistics_of_their_own_layers() -> None:
    batch, model = make_batch(), _OwnNetwork()
    with torch.no_grad():
        parts = [model.body(part).mean((2, 3)) for part in batch.images.split(3)]
    learner = make_learner(model.train())
    learner.learn(batch, epoch=0, step=0, lr=1e-3)
    mean = sum(part.mean(0) for part in parts) / 2
    variance = sum(part.var(0) for part in parts) / 2
    torch.testing.assert_close(model.norm.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var, 0.9 + 0.1 * variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_network_can_be_trained_again(store_url: str, run_url: str, is_cut: bool) -> None:
    """Its layers keep their momentum, of which a training makes use."""
    network = TinyNetwork()

    def cut(epoch: int, step: int, steps: int) -> None:
        if is_cut and step == 2:
            raise PowerCutError

    with suppress(PowerCutError):
        run(SMALL, store_url, run_url, lambda backbone: network, on_step=cut)
    assert network.bn1.momentum == 0.1


def test_validation_takes_no_more_at_once_than_training_or_an_evaluation(
    tiny_store: StoreMaker, run_url: str
) -> None:
    sizes: list[int] = []

    class Watched(TinyNetwork):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not self.training:
                sizes.append(len(images))
            return super().forward(images)

    large = tiny_store(train=130, val=90)
    for micro_batch in (2, 65):
        settings = {"train.batch_size": 130, "train.micro_batch_size": micro_batch}
        config = override(SMALL, {**settings, "train.epochs": 1})
        run(config, large, f"{run_url}/{micro_batch}", lambda backbone: Watched())
    assert sizes == [64, 26, 65, 25]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_fused_optimiser_is_used(optimizer: Any) -> None:
    built = build_optimizer(make_model().parameters(), TrainConfig(optimizer=optimizer))
    assert built.defaults["fused"]


@pytest.mark.parametrize("kind", [TinyNetwork, _OwnNetwork])
def test_random_layers_draw_from_the_place_in_the_run(
    kind: Callable[[float], nn.Module],
) -> None:
    def train(starts: int) -> torch.Tensor:
        torch.manual_seed(1)
        model = kind(0.5)
        learner = make_learner(model.train(), optimizer="sgd")
        torch.manual_seed(starts)
        learner.learn(make_batch(), epoch=0, step=place, lr=0.01)
        return flat(model.state_dict())

    place = 0
    one = train(1)
    assert torch.equal(train(2), one)
    place = 1
    assert not torch.equal(train(1), one)


def test_a_compiled_network_learns_the_same() -> None:
    pytest.importorskip("torch._inductor")
    losses = []
    for compiled in (False, True):
        model = make_model()
        learner = make_learner(model, compile=compiled)
        if compiled:
            model.compile(backend="aot_eager")  # as the setting does, but without a C++ compiler
        losses.append(
            [float(learner.learn(make_batch(), epoch=0, step=i, lr=1e-4)[0]) for i in range(2)]
        )
        assert not any("_orig_mod" in name for name in model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.processors
def test_bfloat16_computes_roughly_and_keeps_exact_weights() -> None:
    """bfloat16 rounds by 2^-9 at most. The network rounds some 40 times one after the other, each
    time either way, so the loss moves by about 40^0.5 * 2^-9 = 0.012; the tolerance is thrice that.

    It holds where each normalisation sees many values, here 64 and more. Over the three values of
    a micro-batch that has shrunk to 1x1, rounding may turn a sign.
    """
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(16, 1, 64, 64, generator=generator), torch.arange(16) % 3 == 0
    batch = Batch(images, targets.float(), tuple(map(str, range(16))))
    losses = []
    for precision in ("float32", "bfloat16"):
        model = make_model()
        learner = make_learner(model, precision=precision, batch_size=16, micro_batch_size=16)
        loss, *_ = learner.learn(batch, epoch=0, step=0, lr=1e-3)
        assert loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses.append(float(loss))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.036)


def test_the_arithmetic_follows_the_device_unless_it_is_set() -> None:
    gpu = torch.device("cuda")
    assert autocast_dtype(TrainConfig(), CPU) == torch.float32
    assert autocast_dtype(TrainConfig(), gpu) == torch.bfloat16
    assert autocast_dtype(TrainConfig(precision="float32"), gpu) == torch.float32
    assert autocast_dtype(TrainConfig(precision="bfloat16"), CPU) == torch.bfloat16


# --- schedule and weight --------------------------------------------------------------------------

schedules = st.builds(
    TrainConfig,
    lr=st.floats(1e-6, 1),
    schedule=st.sampled_from(["constant", "cosine"]),
    warmup_fraction=st.floats(0, 1, exclude_max=True),
)


@given(schedules, st.integers(1, 300))
def test_the_rate_rises_in_warm_up_and_never_again(config: TrainConfig, total: int) -> None:
    rates = [learning_rate(config, step, total) for step in range(total)]
    assert all(0 < rate <= config.lr * (1 + 1e-12) for rate in rates)
    warmup = round(config.warmup_fraction * total)
    for step in range(1, warmup):
        assert rates[step] - rates[step - 1] == pytest.approx(config.lr / warmup)
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    if warmup < total:
        assert rates[warmup] == config.lr
    if config.schedule == "constant":
        assert set(rates[warmup:]) <= {config.lr}


@given(st.integers(3, 300))
def test_a_cosine_is_half_way_in_the_middle_and_ends_at_zero(total: int) -> None:
    config = TrainConfig(lr=2.0, schedule="cosine")
    for step in range(total):
        expected = 1 + math.cos(math.pi * step / total)
        assert learning_rate(config, step, total) == pytest.approx(expected)
    assert learning_rate(config, total - 1, total) < 2.0 * (2 / total) ** 2 * 2


def test_a_balanced_weight_is_negatives_over_positives_of_train(store_url: str) -> None:
    manifest = read_manifest(store_url)
    assert manifest.splits["train"].positives == 17
    assert resolve_pos_weight(TrainConfig(), manifest) == (51 - 17) / 17
    assert resolve_pos_weight(TrainConfig(pos_weight=3.5), manifest) == 3.5


@pytest.mark.parametrize("positives", [0, 51])
def test_a_split_of_one_class_is_refused_before_the_first_step(
    store_url: str, tmp_path: Path, positives: int
) -> None:
    manifest = read_manifest(store_url)
    train = manifest.splits["train"].model_copy(update={"positives": positives})
    one_sided = manifest.model_copy(update={"splits": {**manifest.splits, "train": train}})
    message = rf"train\.pos_weight: balanced needs both classes, and {positives} of the 51 studies"
    with pytest.raises(ConfigError, match=message):
        check_run(SMALL, one_sided, str(tmp_path), num_workers=1)
    weighted = override(SMALL, {"train.pos_weight": 2.0})
    check_run(weighted, one_sided, str(tmp_path), num_workers=1)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_its_metrics_and_tells_its_caller(store_url: str, run_url: str) -> None:
    config = override(SMALL, {"train.schedule": "cosine"})
    started: list[Start] = []
    steps: list[tuple[int, int, int]] = []
    told: list[Epoch] = []
    history = run(
        config,
        store_url,
        run_url,
        on_start=started.append,
        on_step=lambda *arguments: steps.append(arguments),
        on_epoch=told.append,
    )
    (start,) = started
    assert start.initialisation.source == "random"
    assert (start.history, start.step, start.steps) == ((), 0, 4)
    assert steps == [(epoch, step, 4) for epoch in (1, 2) for step in (1, 2, 3, 4)]
    assert [epoch.number for epoch in told] == [1, 2]
    assert [epoch.metrics for epoch in told] == history
    lines = storage.read_text(f"{run_url}/metrics.jsonl").splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [record["epoch"] for record in history] == [1, 2]
    for record in history:
        assert {"train/loss", "val/loss", "val/auroc", "val/accuracy", "val/recall"} < set(record)
        assert record["val/auroc"] is not None
        assert 0 <= record["val/auroc"] <= 1
    for record, last_step in zip(history, (3, 7), strict=True):
        assert record["lr"] == learning_rate(config.train, last_step, 8)

    index = read_index(run_url)
    assert index.finished
    checkpoint = newest(run_url)
    manifest = read_manifest(store_url)
    assert checkpoint.config == config
    assert checkpoint.manifest_digest == manifest.digest
    assert (checkpoint.mean, checkpoint.std) == (manifest.mean, manifest.std)
    assert list(checkpoint.history) == history
    with pytest.raises(RunError, match=rf"{run_url}: holds a finished run of 2 epochs; give anot"):
        run(config, store_url, run_url)


@pytest.mark.parametrize(
    ("build_network", "lr"),
    [(build_tiny, 3e-2), pytest.param(build_model, 1e-3, marks=pytest.mark.slow)],
    ids=["tiny", "resnet18"],
)
def test_a_run_that_was_cut_goes_on_bit_for_bit(
    store_url: str, run_url: str, build_network: Callable[[str], nn.Module], lr: float
) -> None:
    # The store's signal is brightness, which would be changed at random.
    unchanged = {"augment.gray_fraction": 0}
    settings = {"train.epochs": 4, "train.schedule": "cosine", "train.micro_batch_size": 12}
    config = override(SMALL, {**settings, **unchanged})

    def cut(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == (3, 2):
            raise PowerCutError

    config = override(config, {"train.lr": lr})
    whole = run(config, store_url, f"{run_url}/whole", build_network)
    with pytest.raises(PowerCutError):
        run(config, store_url, f"{run_url}/cut", build_network, on_step=cut)
    assert newest(f"{run_url}/cut").epoch == 2
    started: list[int] = []
    rest = run(
        config,
        store_url,
        f"{run_url}/cut",
        build_network,
        on_start=lambda start: started.append(len(start.history)),
    )
    assert started == [2]
    assert without_times(rest) == without_times(whole)
    one, two = newest(f"{run_url}/whole"), newest(f"{run_url}/cut")
    assert torch.equal(flat(one.model), flat(two.model))
    assert without_times(one.history) == without_times(two.history)
    moments = [checkpoint.optimizer["state"].values() for checkpoint in (one, two)]
    for a, b in zip(*moments, strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
        assert a["step"] == b["step"]

    # Positives are brighter by a standard deviation of each pixel's noise: that is learnt.
    losses = [record["train/loss"] or 0.0 for record in whole]
    assert losses[-1] < 0.5 * losses[0]
    assert max(record["val/auroc"] or 0.0 for record in whole) > 0.9


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_that_was_cut_within_an_epoch_goes_on_bit_for_bit(
    store_url: str, run_url: str, dropout: float
) -> None:
    def build(backbone: str) -> nn.Module:
        return TinyNetwork(dropout)

    every = {"train.checkpoint_every_steps": 2, "train.ema_decay": 0.9}
    config = override(SMALL, {"train.keep_checkpoints": 1, **every})
    steps: list[tuple[int, int, int]] = []

    def cut(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == (2, 3):
            raise PowerCutError

    whole = run(config, store_url, f"{run_url}/whole", build)
    with pytest.raises(PowerCutError):
        run(config, store_url, f"{run_url}/cut", build, on_step=cut)
    kept = newest(f"{run_url}/cut")
    assert (kept.epoch, kept.step) == (1, 2)
    rest = run(
        config, store_url, f"{run_url}/cut", build, on_step=lambda *numbers: steps.append(numbers)
    )
    assert steps == [(2, 3, 4), (2, 4, 4)]
    assert without_times(rest) == without_times(whole)
    one, two = newest(f"{run_url}/whole"), newest(f"{run_url}/cut")
    assert torch.equal(flat(one.model), flat(two.model))
    assert one.ema is not None
    assert two.ema is not None
    assert torch.equal(flat(one.ema), flat(two.ema))
    assert {"val/ema_auroc", "val/ema_loss"} < set(rest[-1])
    assert read_index(f"{run_url}/cut").latest.weights == "ema"
    assert read_index(f"{run_url}/cut").latest.val_auroc == rest[-1]["val/ema_auroc"]


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_of_that_step(
    store_url: str, run_url: str
) -> None:
    asked = iter([False, False, True])
    with pytest.raises(PreemptedError, match=r"in epoch 1 after step 3 with a checkpoint"):
        run(SMALL, store_url, f"{run_url}/left", should_stop=lambda: next(asked))
    kept = newest(f"{run_url}/left")
    assert (kept.epoch, kept.step) == (0, 3)
    assert not read_index(f"{run_url}/left").finished
    rest = run(SMALL, store_url, f"{run_url}/left")
    assert without_times(rest) == without_times(run(SMALL, store_url, f"{run_url}/whole"))


def test_a_run_that_is_asked_to_stop_while_it_is_validated_leaves_its_epoch(
    store_url: str, run_url: str
) -> None:
    asked = iter([False] * 4 + [True])
    with pytest.raises(PreemptedError, match=r"in epoch 1 after step 4 with a checkpoint"):
        run(SMALL, store_url, f"{run_url}/left", should_stop=lambda: next(asked))
    kept = newest(f"{run_url}/left")
    assert (kept.epoch, kept.step) == (0, 4)
    rest = run(SMALL, store_url, f"{run_url}/left")
    assert without_times(rest) == without_times(run(SMALL, store_url, f"{run_url}/whole"))


def test_an_epochs_last_step_is_kept_before_it_is_validated(store_url: str, run_url: str) -> None:
    config = override(SMALL, {"train.checkpoint_every_steps": 4, "train.keep_checkpoints": 1})
    asked: list[None] = []

    def cut() -> bool:
        asked.append(None)
        if len(asked) == 10:  # twice four steps, a batch of val, and one
            raise PowerCutError
        return False

    with pytest.raises(PowerCutError):
        run(config, store_url, run_url, should_stop=cut)
    places = [(entry.epoch, entry.step) for entry in read_index(run_url).entries]
    assert places == [(1, 0), (1, 4)]
    run(config, store_url, run_url)
    assert [(e.epoch, e.step) for e in read_index(run_url).entries if e.step] == []


def test_a_damaged_checkpoint_costs_an_epoch_and_is_told(store_url: str, tmp_path: Path) -> None:
    def cut(epoch: int, step: int, steps: int) -> None:
        if epoch == 3:
            raise PowerCutError

    config, notes, started = override(SMALL, {"train.epochs": 3}), list[str](), list[int]()
    with pytest.raises(PowerCutError):
        run(config, store_url, str(tmp_path), on_step=cut)
    damaged = tmp_path / "checkpoints" / read_index(str(tmp_path)).latest.name
    damaged.write_bytes(damaged.read_bytes()[:1000])
    run(
        config,
        store_url,
        str(tmp_path),
        tell=notes.append,
        on_start=lambda start: started.append(len(start.history)),
    )
    assert started == [1]
    assert any(f"{damaged.name}: its SHA-256 differs from the index" in note for note in notes)
    assert read_index(str(tmp_path)).finished


@pytest.fixture
def _small_files() -> Iterator[None]:
    """No file of this process may grow above 8 MB: a disk that is full for checkpoints."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_small_files")
def test_a_disk_that_is_full_ends_the_run_at_the_first_checkpoint(
    store_url: str, tmp_path: Path
) -> None:
    told: list[int] = []
    message = (
        r"^no checkpoint could be written: storage: cannot write .*: File too large; repair that"
    )
    with pytest.raises(CheckpointError, match=message):
        run(
            override(SMALL, {"train.epochs": 9}),
            store_url,
            str(tmp_path),
            build_model,  # of 134 MB
            on_epoch=lambda epoch: told.append(epoch.number),
        )
    assert told in ([1], [1, 2])


def test_a_run_ends_early_when_patience_does(store_url: str, run_url: str) -> None:
    # So small a rate changes no rank: the first epoch stays the best.
    notes: list[str] = []
    # Only running statistics change, so no record is broken for long.
    config = override(SMALL, {"train.lr": 1e-30, "train.epochs": 40, "train.patience": 2})
    config = override(config, {"train.optimizer": "sgd"})
    history = run(config, store_url, run_url, tell=notes.append)
    scores = [record["val/auroc"] or 0.0 for record in history]
    best = scores.index(max(scores))
    assert len(history) == best + 3 < 40
    index = read_index(run_url)
    assert index.finished
    assert index.stopped_early
    assert notes[-1].startswith("no better val AUROC in 2 epochs (train.patience): the run ends")


def test_the_pace_is_told_once_a_second_and_at_the_end_of_an_epoch(
    store_url: str, run_url: str
) -> None:
    reports: list[StepProgress] = []
    begun_s = time.monotonic()
    history = run(
        override(SMALL, {"train.epochs": 1}),
        store_url,
        run_url,
        on_progress=reports.append,
        on_step=lambda epoch, step, steps: time.sleep(1.1 if step == 1 else 0),
    )
    assert len(reports) <= time.monotonic() - begun_s + 1
    by_place = {(progress.epoch, progress.step, progress.steps): progress for progress in reports}
    second, last = by_place[1, 2, 4], by_place[1, 4, 4]
    assert last is reports[-1]
    losses = [progress.metrics["train/loss"] or 0.0 for progress in reports]
    if len(reports) == 2:  # on a busy machine more steps may take a second
        assert (2 * losses[0] + 2 * losses[1]) / 4 == pytest.approx(history[0]["train/loss"])
    assert all((progress.metrics["grad_norm"] or 0) > 0 for progress in reports)
    assert last.metrics["grad_norm"] == history[0]["grad_norm"] != second.metrics["grad_norm"]
    for name in ("images_per_s", "step_p50_s", "step_p95_s"):
        assert (history[0][name] or 0) > 0
    assert 0 <= (history[0]["data_wait"] or 0) <= 1


class _SlowFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """An object store that answers at once, but of train's eight blocks it keeps back the last that
    is asked for, until some time after the first step."""

    protocol = "slowly"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped: str = super()._strip_protocol(path.removeprefix("slowly://"))
        return stripped

    asked = itertools.count(1)
    has_begun = threading.Event()
    pause_s = 0.0

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        is_block = "/train/" in path and start is not None and end is not None and end - start > 1
        if is_block and next(self.asked) == 8:
            assert self.has_begun.wait(300), "no step without the last block"
            time.sleep(self.pause_s)
        data: bytes = super().cat_file(path, start, end, **options)
        return data


def test_waiting_for_data_is_told_in_a_run_of_one_epoch(
    tiny_store: StoreMaker, run_url: str
) -> None:
    folder = Path(tiny_store(train=120, val=13, samples_per_shard=16))
    fsspec.register_implementation("slowly", _SlowFileSystem, clobber=True)
    slow = fsspec.filesystem("slowly")
    for path in folder.rglob("*.*"):
        slow.pipe_file(f"/store/{path.relative_to(folder)}", path.read_bytes())
    streamed = {"data.cache": "stream"}
    notes: list[str] = []
    config = override(SMALL, {"train.epochs": 1, "train.micro_batch_size": 12, **streamed})
    begun_s = time.monotonic()
    run(config, str(folder), f"{run_url}/quick")
    # Four times what all computing takes here and now, and more than the second that counts.
    _SlowFileSystem.pause_s = 2.0 + 4 * (time.monotonic() - begun_s)
    run(
        config,
        "slowly:///store",
        run_url,
        tell=notes.append,
        on_step=lambda *_: _SlowFileSystem.has_begun.set(),
    )
    assert any(
        "% of the time until epoch 1 was spent waiting for data; keep" in n for n in notes
    ), notes


def test_held_or_streamed_a_run_is_the_same_bit_for_bit(store_url: str, run_url: str) -> None:
    notes: list[str] = []
    histories = [
        run(
            override(SMALL, {"data.cache": way}),
            store_url,
            f"{run_url}/{way}",
            tell=notes.append,
        )
        for way in ("memory", "stream")
    ]
    assert without_times(histories[0]) == without_times(histories[1])
    one, two = newest(f"{run_url}/memory"), newest(f"{run_url}/stream")
    assert torch.equal(flat(one.model), flat(two.model))
    assert [note.split("(")[0] for note in notes if note.startswith("data:")] == [
        "data: train: kept in memory ",
        "data: val: kept in memory ",
        "data: train: streamed, as data.cache says ",
        "data: val: streamed, as data.cache says ",
    ]


def test_a_loss_that_is_no_number_ends_the_run(store_url: str, run_url: str) -> None:
    config = override(SMALL, {"train.lr": 1e30})
    message = (
        r"epoch 1, step \d: the training loss is (nan|inf); give another --run with a lower "
        r"train\.lr, now 1e\+30"
    )
    with pytest.raises(DivergedError, match=message):
        run(config, store_url, run_url)
    assert find_index(run_url) is None
    left = json.loads(storage.read_text(f"{run_url}/diverged.json"))
    assert left["epoch"] == 1
    assert left["lr"] == 1e30
    assert len(left["keys"]) == len(set(left["keys"])) == 12


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture
def begun_run(store_url: str, tmp_path: Path) -> str:
    """A run of which one epoch is done."""
    checkpoint = Checkpoint(
        model={},
        optimizer={},
        epoch=1,
        config=SMALL,
        manifest_digest=read_manifest(store_url).digest,
        image_size=32,
        mean=0.5,
        std=0.2,
        history=({"val/auroc": 0.5},),
        initialisation="random",
        code_version="0",
    )
    attempt = claim_run(str(tmp_path))
    save_checkpoint(str(tmp_path), checkpoint, attempt=attempt, keep_last=1, finished=False)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.lr": 0.5}, "train"),
        ({"seed": 9}, "seed"),
        ({"augment.rotation_degrees": 1.0, "model.backbone": "resnet34"}, "augment, model"),
        ({"data.image_size": 32}, "data"),
    ],
)
def test_other_settings_do_not_go_on_with_a_run(
    begun_run: str, store_url: str, changes: dict[str, Any], named: str
) -> None:
    manifest = read_manifest(store_url)
    message = (
        rf"^{begun_run}: was started with other settings in {named}; repeat them to resume, or"
    )
    with pytest.raises(RunError, match=message):
        check_run(override(SMALL, changes), manifest, begun_run, num_workers=1)


def test_settings_that_do_not_touch_training_may_change(begun_run: str, store_url: str) -> None:
    changed = override(
        SMALL,
        {
            "cluster.num_workers": 3,
            "evaluate.sensitivity": 0.8,
            "tracking.mode": "offline",
            "data.cache": "stream",
        },
    )
    check_run(changed, read_manifest(store_url), begun_run, num_workers=3)


def test_weights_of_another_model_are_not_taken(begun_run: str, store_url: str) -> None:
    message = rf"^{begun_run}: its newest checkpoint has the weights of another model"
    with pytest.raises(CheckpointError, match=message):
        run(SMALL, store_url, begun_run)


def test_another_store_does_not_go_on_with_a_run(begun_run: str, tiny_store: StoreMaker) -> None:
    other = read_manifest(tiny_store(seed=1))
    message = rf"was started on another store \(manifest \w{{12}}, not {other.digest[:12]}\); give"
    with pytest.raises(RunError, match=message):
        check_run(SMALL, other, begun_run, num_workers=1)


@pytest.mark.parametrize(
    ("changes", "num_workers", "message"),
    [
        ({"data.image_size": 64}, 1, r"data\.image_size: 64 is above the store's 32"),
        (
            {"train.batch_size": 12},
            5,
            r"train\.batch_size: 12 is 4 micro-batches of 3, too few",
        ),
        ({"train.batch_size": 54}, 1, r"train\.batch_size: 54 is more than the 51 samples"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_the_first_step(
    store_url: str, tmp_path: Path, changes: dict[str, Any], num_workers: int, message: str
) -> None:
    manifest = read_manifest(store_url)
    with pytest.raises(ConfigError, match=message):
        check_run(override(SMALL, changes), manifest, str(tmp_path), num_workers=num_workers)


def test_weights_that_do_not_fit_are_refused_before_the_first_step(
    store_url: str, tmp_path: Path
) -> None:
    manifest = read_manifest(store_url)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    for name, message in (("weights.pt", "does not fit"), ("absent.pt", "is no file; give 'image")):
        config = override(SMALL, {"model.weights": str(tmp_path / name)})
        with pytest.raises(ConfigError, match=rf"^model\.weights: .*{name}'? {message}"):
            check_run(config, manifest, str(tmp_path / "fresh"), num_workers=1)


def test_compiling_without_a_compiler_is_refused_before_the_first_step(
    tiny_store: StoreMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    config = override(SMALL, {"train.compile": True})
    with pytest.raises(
        ConfigError, match=r"^train\.compile: .* none of gcc, clang, cc was found here;"
    ):
        run(config, tiny_store(), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert run(SMALL, tiny_store(), str(tmp_path / "run"))


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        run(SMALL, str(tmp_path / "none"), str(tmp_path / "run"))


# --- several ranks --------------------------------------------------------------------------------

_RANK = """
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.errors import DivergedError, PreemptedError
from pneumo.training.callbacks import Callbacks
from pneumo.training.fit import fit
from tests.networks import build_tiny

(store_url,) = arguments
config = Config.model_validate_json((folder / "config.json").read_text())
asked = iter([False, False, rank == 1])

def train(name, **callbacks):
    history = fit(config, store_url=store_url, run_url=str(folder / name), world=world,
                  device=torch.device("cpu"), callbacks=Callbacks(**callbacks),
                  build_network=build_tiny)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(history))

if size == 2:
    diverging = override(config, {"train.lr": 1e30, "train.optimizer": "adam"})
    try:
        fit(diverging, store_url=store_url, run_url=str(folder / "diverged"), world=world,
            device=torch.device("cpu"), callbacks=Callbacks(), build_network=build_tiny)
        raise SystemExit("went on though the loss is no number")
    except DivergedError as error:
        (folder / f"diverged-{rank}.json").write_text(json.dumps(str(error)))
    try:
        train("asked", should_stop=lambda: next(asked, False))
        raise SystemExit("went on though one rank was asked to stop")
    except PreemptedError:
        pass
    train("begun")
train("fresh")
"""


def read_history(folder: Path, name: str, rank: int) -> Any:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def begin_weights() -> dict[str, torch.Tensor]:
    """The weights of SMALL before its first step."""
    model = TinyNetwork()
    initialise(model, SMALL.model, seed=SMALL.seed)
    return dict(model.named_parameters())


def assert_alike(
    history: Any, checkpoint: Checkpoint, alone: Any, checkpoint_alone: Checkpoint
) -> None:
    """Equal up to the rounding of sums."""
    for record, expected in zip(without_times(history), without_times(alone), strict=True):
        assert record.keys() == expected.keys()
        for name, value in expected.items():
            within = 0.01 if name == "grad_norm" else 1e-3
            # None, of a precision without a positive call, is compared as it is.
            alike = None if value is None else pytest.approx(value, rel=within, abs=within)
            assert record[name] == alike, name
    one, two, start = (
        flat({name: state[name] for name in begin_weights()})
        for state in (checkpoint.model, checkpoint_alone.model, begin_weights())
    )
    # Of the way that they went: all weights are near those that they began with.
    assert (one - two).norm() < 1e-2 * (two - start).norm()
    for name, weights in checkpoint_alone.model.items():
        if "running" in name:
            torch.testing.assert_close(checkpoint.model[name], weights, rtol=1e-2, atol=1e-3)
        if "tracked" in name:
            assert checkpoint.model[name] == weights


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.processors), 3, 4])
def test_any_number_of_ranks_computes_what_one_does(
    tiny_store: StoreMaker, tmp_path: Path, size: int
) -> None:
    store_url = tiny_store(train=99, val=13, image_size=64)
    changes = {"train.batch_size": 24, "train.micro_batch_size": 6, "train.optimizer": "sgd"}
    config = override(SMALL, {**changes, "train.lr": 1e-3, "train.checkpoint_every_steps": 2})
    (tmp_path / "config.json").write_text(config.to_json())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: sums in the same order
    alone = run(config, store_url, str(tmp_path / "alone"))

    def cut(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == (2, 3):
            raise PowerCutError

    with pytest.raises(PowerCutError):
        run(config, store_url, str(tmp_path / "begun"), on_step=cut)
    torch.set_num_threads(threads)
    run_ranks(_RANK, tmp_path, size, store_url)

    reference = newest(str(tmp_path / "alone"))
    # What one rank began, two go on with in mid-epoch.
    for name in ("fresh", "begun") if size == 2 else ("fresh",):
        histories = [read_history(tmp_path, name, rank) for rank in range(size)]
        assert all(without_times(h) == without_times(histories[0]) for h in histories)
        assert_alike(histories[0], newest(str(tmp_path / name)), alone, reference)
        assert read_index(str(tmp_path / name)).finished
    if size == 2:
        left = newest(str(tmp_path / "asked"))
        assert (left.epoch, left.step) == (0, 3)
        # A loss that is no number ends all ranks at once, and the file has the keys of all.
        said = [read_history(tmp_path, "diverged", rank) for rank in range(size)]
        assert said[0] == said[1]
        assert re.match(r"epoch 1, step \d: the training loss is (nan|inf); give ano", said[0])
        facts = json.loads((tmp_path / "diverged" / "diverged.json").read_text())
        assert len(facts["keys"]) == len(set(facts["keys"])) == 24
