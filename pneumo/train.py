"""fit(): plain torch and torch.distributed. Read it from top to bottom and know what a run does.

The same function runs alone, under torchrun and under Ray Train; who calls it says which rank this
is and hears of every epoch. Batch normalisation takes its statistics from each rank's own part of
the batch; the running statistics that evaluation and checkpoints use are rank 0's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric

from pneumo import loader, metrics, partition, storage
from pneumo.checkpoint import (
    Checkpoint,
    describe_code,
    find_index,
    load_checkpoint,
    save_checkpoint,
)
from pneumo.config import Config, TrainConfig
from pneumo.errors import DataError, DivergedError, PreemptedError, RunError
from pneumo.loader import Batch, Loader
from pneumo.model import Initialisation, build_model, initialise
from pneumo.partition import World
from pneumo.predict import score
from pneumo.shards import Manifest, read_manifest

METRICS_LOG = "metrics.jsonl"
TRAINING_SECTIONS = ("seed", "data", "augment", "model", "train")
"""The settings that a resumed run must share with its checkpoint, but for `data.*` that only say
how the same batches come about."""


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch."""

    number: int
    """Counted from 1."""
    metrics: dict[str, float | None]
    """train/loss, val/loss, val/auroc, val/accuracy, val/precision, val/recall (at p = 0.5; None
    where undefined), lr, images_per_s, epoch_s."""


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear; each is called on every rank."""

    on_start: Callable[[Initialisation, int], None] = lambda initialisation, first_epoch: None
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_note: Callable[[str], None] = lambda line: None
    """A line worth knowing: how each split is fed."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every epoch; where any rank says yes, all raise PreemptedError."""


@dataclass(eq=False)
class _State:
    """What changes while training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    initialisation: Initialisation
    history: list[dict[str, float | None]]


def fit(
    config: Config,
    *,
    store_url: str,
    run_url: str,
    world: World,
    device: torch.device,
    hooks: Hooks,
) -> list[dict[str, float | None]]:
    """Train on the store's train split, judge on val, leave checkpoints and metrics.jsonl in the
    run.

    Goes on after the run's newest checkpoint, if there is one. Returns the epochs' metrics. With
    `world.size` > 1 torch.distributed must be initialised. Raises RunError, StoreError,
    ConfigError, DataError, DivergedError.
    """
    manifest = read_manifest(store_url)
    image_size = check_run(config, manifest, run_url, num_workers=world.size)
    train_data, val_data = (
        loader.open_loader(
            store_url,
            manifest,
            split,
            config.data,
            image_size=image_size,
            mean=manifest.mean,
            std=manifest.std,
            world=world,
            device=device,
            tell=hooks.on_note,
        )
        for split in ("train", "val")
    )
    state = _begin(config, run_url, world, device)
    hooks.on_start(state.initialisation, len(state.history))
    network = _distribute(state.model, world, device)
    loss_weight = torch.tensor(resolve_pos_weight(config.train, manifest), device=device)
    for epoch in range(len(state.history), config.train.epochs):
        started = time.perf_counter()
        train_loss = _train_epoch(
            network, state.optimizer, train_data, config, epoch, loss_weight, hooks
        )
        seconds = time.perf_counter() - started
        _share_buffers(state.model, world)
        steps = partition.steps_per_epoch(len(train_data), config.train.batch_size)
        record = Epoch(
            epoch + 1,
            {
                "epoch": epoch + 1,
                "train/loss": train_loss,
                **_validate(state.model, val_data, config, world, float(loss_weight)),
                "lr": state.optimizer.param_groups[0]["lr"],
                "images_per_s": steps * config.train.batch_size / seconds,
                "epoch_s": time.perf_counter() - started,
            },
        )
        state.history.append(record.metrics)
        if world.rank == 0:
            _save(state, config, manifest, image_size, run_url)
        _barrier(world)
        hooks.on_epoch(record)
        if epoch + 1 < config.train.epochs and _any_rank(hooks.should_stop(), world):
            raise PreemptedError(f"{run_url}: told to stop after epoch {epoch + 1}")
    return state.history


def check_run(config: Config, manifest: Manifest, run_url: str, *, num_workers: int) -> int:
    """What can be known before the first step; the image size to train at.

    Raises RunError when the run is finished or of another configuration or store, and ConfigError
    for sizes that do not fit.
    """
    image_size = loader.input_size(manifest, config.data.image_size)
    partition.check_batch_size(config.train.batch_size, num_workers)
    partition.steps_per_epoch(manifest.splits["train"].samples, config.train.batch_size)
    index = find_index(run_url)
    if index is None or not index.entries:
        return image_size
    if index.finished:
        raise RunError(
            f"{run_url}: holds a finished run of {index.latest.epoch} epochs; give another --run"
        )
    before = load_checkpoint(run_url, index.latest)
    if before.manifest_digest != manifest.digest:
        raise RunError(
            f"{run_url}: was begun on another store (manifest {before.manifest_digest[:12]}, not "
            f"{manifest.digest[:12]}); give another --run"
        )
    then, now = (_training_settings(each) for each in (before.config, config))
    changed = [name for name in TRAINING_SECTIONS if then[name] != now[name]]
    if changed:
        raise RunError(
            f"{run_url}: was begun with other settings in {', '.join(changed)}; repeat them to go "
            "on, or give another --run"
        )
    return image_size


def _training_settings(config: Config) -> dict[str, Any]:
    settings = config.model_dump(include=set(TRAINING_SECTIONS))
    return {**settings, "data": config.data.image_size}


def resolve_pos_weight(config: TrainConfig, manifest: Manifest) -> float:
    """The number behind `pos_weight`: negatives / positives of the training split if balanced."""
    if config.pos_weight != "balanced":
        return config.pos_weight
    train = manifest.splits["train"]
    return (train.samples - train.positives) / train.positives


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate at a step of the run: warm-up, then constant or half a cosine. No state to
    resume."""
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def autocast_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The arithmetic of forward and backward; weights, optimiser and scoring stay float32."""
    if config.precision == "native" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    if config.precision in ("auto", "native"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    pos_weight: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """One optimiser step on this rank's part of a batch; the loss, detached, on the device."""
    with torch.autocast(batch.images.device.type, dtype, enabled=dtype != torch.float32):
        logits = network(batch.images).squeeze(1)
    loss = F.binary_cross_entropy_with_logits(logits.float(), batch.targets, pos_weight=pos_weight)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _begin(config: Config, run_url: str, world: World, device: torch.device) -> _State:
    """A fresh state, or that of the run's newest checkpoint."""
    model = build_model(config.model.backbone)
    index = find_index(run_url)
    if index is not None and index.entries:
        before = load_checkpoint(run_url, index.latest)
        model.load_state_dict(before.model)
        initialisation = Initialisation(
            before.initialisation, f"going on from epoch {before.epoch} of this run"
        )
        history = list(before.history)
    else:
        before = None
        # Only rank 0 fetches weights; DDP hands them to the others when it wraps the model.
        wanted = (
            config.model
            if world.rank == 0
            else config.model.model_copy(update={"weights": "random"})
        )
        initialisation = initialise(model, wanted, seed=config.seed)
        history = []
    model.to(device)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay
    )
    if before is not None:
        optimizer.load_state_dict(before.optimizer)
    return _State(model, optimizer, initialisation, history)


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Loader,
    config: Config,
    epoch: int,
    pos_weight: Tensor,
    hooks: Hooks,
) -> float:
    """Mean loss of the epoch over all ranks. Raises DivergedError when it is no number."""
    steps = partition.steps_per_epoch(len(data), config.train.batch_size)
    dtype = autocast_dtype(config.train, data.device)
    network.train()
    # NaN must reach the check below; the default would drop it.
    mean_loss = MeanMetric(nan_strategy="disable").to(data.device)
    batches = data.epoch(
        epoch, seed=config.seed, batch_size=config.train.batch_size, augment=config.augment
    )
    for step, batch in enumerate(batches):
        rate = learning_rate(config.train, epoch * steps + step, config.train.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mean_loss.update(train_step(network, optimizer, batch, pos_weight=pos_weight, dtype=dtype))
        hooks.on_step(epoch + 1, step + 1, steps)
    loss = float(mean_loss.compute())  # over all ranks
    if not math.isfinite(loss):
        raise DivergedError(
            f"epoch {epoch + 1}: the training loss is {loss}; lower train.lr, now {config.train.lr}"
        )
    return loss


def _validate(
    model: nn.Module,
    data: Loader,
    config: Config,
    world: World,
    pos_weight: float,
) -> dict[str, float | None]:
    """Metrics of the whole val split, the same on every rank, each sample counted once."""
    batch_size = max(config.train.batch_size // world.size, 1)
    scores: Any = score(model, data.evaluation(batch_size=batch_size))
    parts = [scores]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, scores)
    # The ranks' shares follow one another in the store's order.
    logits = np.concatenate([part.logits for part in parts]).astype(np.float64)
    target = np.concatenate([part.targets for part in parts])
    studies = len({key for part in parts for key in part.keys})
    if len(logits) != len(data) or studies != len(data):
        raise DataError(
            f"val: {len(logits)} scores of {studies} studies, expected {len(data)} once"
        )
    loss = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logits),
        torch.from_numpy(target).double(),
        pos_weight=torch.tensor(pos_weight, dtype=torch.float64),
    )
    values = {"loss": float(loss), **metrics.binary_metrics_from_logits(target, logits)}
    return {f"val/{name}": v if math.isfinite(v) else None for name, v in values.items()}


def _save(state: _State, config: Config, manifest: Manifest, image_size: int, run_url: str) -> None:
    lines = (json.dumps(record, allow_nan=False) for record in state.history)
    storage.write_text(storage.join(run_url, METRICS_LOG), "\n".join(lines) + "\n")
    checkpoint = Checkpoint(
        model=state.model.state_dict(),
        optimizer=state.optimizer.state_dict(),
        epoch=len(state.history),
        config=config,
        manifest_digest=manifest.digest,
        image_size=image_size,
        mean=manifest.mean,
        std=manifest.std,
        history=tuple(state.history),
        initialisation=state.initialisation.source,
        code_version=describe_code(),
    )
    save_checkpoint(
        run_url,
        checkpoint,
        keep_last=config.train.keep_checkpoints,
        finished=len(state.history) == config.train.epochs,
    )


def _distribute(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    if world.size == 1:
        return model
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _share_buffers(model: nn.Module, world: World) -> None:
    """Rank 0's running statistics to all, so that every rank judges the model that is saved."""
    if world.size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def _any_rank(stop: bool, world: World) -> bool:
    votes: list[Any] = [stop]
    if world.size > 1:
        votes = [None] * world.size
        dist.all_gather_object(votes, stop)
    return any(votes)


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
