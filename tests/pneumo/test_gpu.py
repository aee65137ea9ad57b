"""What only a GPU can show. Skips where there is none."""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pneumo.config import AugmentConfig, Config, DataConfig, TrainConfig
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.loading import augmentation
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import Batch, open_loader
from pneumo.loading.prefetch import prefetch, to_device
from pneumo.loading.sample_order import World
from pneumo.network.backbones import build_model, initialise
from pneumo.network.gray_convolution import GrayConv2d
from pneumo.network.scoring import Member, score_images
from pneumo.training.callbacks import Callbacks
from pneumo.training.checkpoints import load_checkpoint, read_index
from pneumo.training.fit import fit
from pneumo.training.preconditions import has_compiler
from pneumo.training.step_results import EpochTotals, StepResults
from pneumo.training.train_step import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

StoreMaker = Callable[..., str]
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SMALL = override(
    Config(seed=2),
    {
        "model.weights": "random",
        "train.batch_size": 12,
        "train.micro_batch_size": 6,
        "train.lr": 1e-3,
        "train.epochs": 2,
    },
)


def make_learner(device: torch.device, **changes: Any) -> Learner:
    settings = {"batch_size": 16, "micro_batch_size": 8, "optimizer": "sgd"} | changes
    model = build_model("resnet18")
    initialise(model, SMALL.model, seed=4)
    config = TrainConfig.model_validate(settings)
    return Learner(model.train(), config, pos_weight=2.0, seed=0, world=World(), device=device)


def make_batch(device: torch.device) -> Batch:
    images = torch.randn(16, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(16) % 3 == 0).float()
    return Batch(images.to(device), targets.to(device), tuple(map(str, range(16))))


def learn(learner: Learner, steps: int = 3) -> list[float]:
    batch = make_batch(learner.device)
    return [float(learner.learn(batch, epoch=0, step=i, lr=1e-3)[0]) for i in range(steps)]


# --- a step ---------------------------------------------------------------------------------------


def test_results_are_read_one_step_late_and_whole() -> None:
    results = StepResults(GPU, EpochTotals())
    for step in range(5):
        values = torch.tensor([step + 0.5, float(step == 3), 8.0, float(step)], device=GPU)
        results.put(step, (f"key-{step}",), values)
        assert results.losses == [i + 0.5 for i in range(step)]
        assert results.should_stop is (step > 3)
    results.read_all()
    assert results.totals == EpochTotals(step=5, loss=12.5, samples=40, grad_norm=4.0)


def test_a_step_is_the_one_on_a_cpu_and_bfloat16_is_near_it() -> None:
    expected = learn(make_learner(CPU, precision="float32"))
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert learn(make_learner(GPU, precision="float32")) == pytest.approx(expected, rel=1e-3)
    finally:
        torch.backends.cudnn.allow_tf32 = True
    rough = learn(make_learner(GPU))
    assert rough == pytest.approx(expected, rel=0.05)
    assert rough != expected


@pytest.mark.skipif(not has_compiler(), reason="no C compiler here")
def test_a_compiled_step_is_the_plain_one() -> None:
    compiled = learn(make_learner(GPU, compile=True))
    assert compiled == pytest.approx(learn(make_learner(GPU)), rel=0.02)


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_v2_s", "convnext_tiny"])
def test_the_stem_on_the_device_is_the_plain_convolution(backbone: str) -> None:
    [stem] = [
        module for module in build_model(backbone).modules() if isinstance(module, GrayConv2d)
    ]
    images = torch.randn(4, 1, 64, 96)
    torch.backends.cudnn.allow_tf32 = False
    try:
        for odd in (0, 1):  # an odd side goes the plain way
            part = images[..., : 64 - odd, :]
            expected = stem.cpu()(part)
            torch.testing.assert_close(
                stem.to(GPU)(part.to(GPU)).cpu(), expected, rtol=1e-4, atol=1e-5
            )
    finally:
        torch.backends.cudnn.allow_tf32 = True


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_warp_on_the_device_is_the_one_on_the_host(compiled: bool) -> None:
    if compiled and not has_compiler():
        pytest.skip("no C compiler here")
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (16, 1, 9, 9)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 255).byte()
    keys = [f"study-{i}" for i in range(16)]
    options: dict[str, Any] = {"seed": 1, "epoch": 2, "moments": (0.5, 0.25)}
    config = AugmentConfig()
    on_host = augmentation.augment(smooth, keys, config, **options)
    on_device = augmentation.augment(
        smooth.to(GPU), keys, config, **options, compiled=compiled
    ).cpu()
    levels = (on_device - on_host).abs() * 0.25 * 255
    assert levels.quantile(0.95) <= 1.5


@pytest.mark.parametrize("way", ["memory", "stream"])
def test_batches_on_the_device_are_those_on_the_host(tiny_store: StoreMaker, way: Any) -> None:
    store_url = tiny_store(train=51, val=13)
    manifest = read_manifest(store_url)

    def batches(device: torch.device) -> Iterator[Batch]:
        store = PreparedStore(store_url, manifest, DataConfig(cache=way))
        data = open_loader(store, "train", world=World(), device=device)
        still = AugmentConfig(rotation_degrees=0, translation_fraction=0, scale_fraction=0)
        for epoch in (0, 1):
            yield from data.epoch(epoch, seed=0, batch_size=12, augment=still)
        yield from data.evaluation(batch_size=7)

    count = 0
    for ours, theirs in zip(batches(GPU), batches(CPU), strict=True):
        assert ours.keys == theirs.keys
        assert ours.images.device == ours.targets.device == GPU
        torch.testing.assert_close(ours.targets.cpu(), theirs.targets)
        torch.testing.assert_close(ours.images.cpu(), theirs.images, rtol=0, atol=2 / 255 / 0.1)
        count += 1
    assert count == 2 * 4 + 8


def test_a_batch_made_ahead_is_whole_when_it_is_used() -> None:
    def make() -> Generator[torch.Tensor, None, None]:
        for number in range(30):
            big = torch.zeros(64, 512, 512, device=GPU)
            for _ in range(10):  # the device is long at it
                big += 0.1 * number
            yield to_device(torch.full((8,), float(number)), GPU) + big.mean()

    def hold(batch: torch.Tensor) -> list[torch.Tensor]:
        return [batch]

    for number, batch in enumerate(prefetch(make(), GPU, hold)):
        assert torch.allclose(batch, torch.full((8,), 2.0 * number, device=GPU), rtol=1e-3)


# --- a run ----------------------------------------------------------------------------------------


def run(config: Config, store_url: str, run_url: str, **callbacks: Any) -> list[dict[str, Any]]:
    return fit(
        config,
        store_url=store_url,
        run_url=run_url,
        world=World(),
        device=GPU,
        callbacks=Callbacks(**callbacks),
    )


class PowerCutError(Exception):
    """Ends a run in the middle."""


def test_a_run_that_was_cut_goes_on_where_it_was(tiny_store: StoreMaker, tmp_path: Path) -> None:
    store_url = tiny_store(train=51, val=13)
    config = override(SMALL, {"train.checkpoint_every_steps": 2, "train.ema_decay": 0.9})

    def cut(epoch: int, step: int, steps: int) -> None:
        if (epoch, step) == (2, 3):
            raise PowerCutError

    whole = run(config, store_url, str(tmp_path / "whole"))
    with pytest.raises(PowerCutError):
        run(config, store_url, str(tmp_path / "cut"), on_step=cut)
    rest = run(config, store_url, str(tmp_path / "cut"))
    for record, expected in zip(rest, whole, strict=True):
        assert record["data/samples"] == expected["data/samples"]
        assert record["train/loss"] == pytest.approx(expected["train/loss"], rel=0.05)
        assert record["gpu_memory_gb"] > 0
    index = read_index(str(tmp_path / "cut"))
    loaded = load_checkpoint(str(tmp_path / "cut"), index.latest)
    assert all(tensor.device == CPU for tensor in loaded.model.values())


def test_a_device_needs_no_number_and_a_run_may_be_compiled(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    store_url = tiny_store(train=51, val=13)
    config = override(SMALL, {"train.compile": has_compiler()})
    plain = run(SMALL, store_url, str(tmp_path / "plain"))
    found = fit(
        config,
        store_url=store_url,
        run_url=str(tmp_path / "compiled"),
        world=World(),
        device=torch.device("cuda"),
        callbacks=Callbacks(),
    )
    for record, expected in zip(found, plain, strict=True):
        assert record["data/samples"] == expected["data/samples"]
        assert record["train/loss"] == pytest.approx(expected["train/loss"], rel=0.05)


def test_one_rank_of_nccl_trains(tiny_store: StoreMaker, tmp_path: Path) -> None:
    store_url = tiny_store(train=51, val=13)
    plain = run(SMALL, store_url, str(tmp_path / "plain"))
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        found = [0.0]
        dist.all_gather_object(found, 1.5)
        assert found == [1.5]
        within = run(SMALL, store_url, str(tmp_path / "within"))
    finally:
        dist.destroy_process_group()
    losses = [[record["train/loss"] for record in history] for history in (plain, within)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_scores_that_are_published_are_float32_throughout() -> None:
    model = build_model("resnet18")
    initialise(model, SMALL.model, seed=4)
    pixels = list(np.random.default_rng(0).integers(0, 256, (8, 64, 64), dtype=np.uint8))

    def score(device: torch.device) -> Any:
        return score_images([Member(model.to(device), "resnet18", 64, 0.5, 0.25)], pixels)

    torch.testing.assert_close(
        torch.from_numpy(score(GPU)), torch.from_numpy(score(CPU)), rtol=1e-4, atol=1e-4
    )
    assert torch.backends.cudnn.allow_tf32
