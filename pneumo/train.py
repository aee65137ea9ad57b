"""fit(): plain torch and torch.distributed. Read it from top to bottom and know what a run does.

The same function runs alone, under torchrun and under Ray Train; who calls it says which rank this
is and hears of every epoch. Batches, gradients and BatchNorm's statistics do not depend on the
number of ranks (`learner.py`): losses and weights agree up to the rounding of sums.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pneumo import loader, metrics, partition, storage
from pneumo.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_to_cpu,
    describe_code,
    find_index,
    load_newest,
    save_checkpoint,
)
from pneumo.config import Config, TrainConfig
from pneumo.errors import CheckpointError, DataError, DivergedError, PreemptedError, RunError
from pneumo.feeds import Held
from pneumo.learner import Learner
from pneumo.loader import Loader
from pneumo.model import Initialisation, build_model, initialise
from pneumo.optimise import learning_rate
from pneumo.outcomes import Divergence, Outcomes
from pneumo.partition import World
from pneumo.predict import Scores, score
from pneumo.shards import Manifest, read_manifest
from pneumo.timing import StepTimes

METRICS_LOG = "metrics.jsonl"
DIVERGED = "diverged.json"
TRAINING_SECTIONS = ("seed", "data", "augment", "model", "train")
"""The settings that a resumed run must share with its checkpoint, but for those that only say how
the same weights come about."""
_NO_MATTER = {"compile", "keep_checkpoints", "checkpoint_every_steps"}
_REPORTS_PER_EPOCH = 25
_SLOW_DATA = 0.05
"""Share of an epoch spent waiting for data from which on it is said, where it is a second at
least."""


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch."""

    number: int
    """Counted from 1."""
    metrics: dict[str, float | None]
    """train/loss; lr and grad_norm at its end; val/loss, val/auroc, val/accuracy, val/precision,
    val/recall (at p = 0.5; None where undefined) and the same as val/ema_… of the averaged weights;
    epoch_s, and what `StepTimes.read` gives."""


@dataclass(frozen=True)
class Pace:
    """How training goes within an epoch."""

    epoch: int
    """Counted from 1."""
    step: int
    """Steps done of it."""
    steps: int
    metrics: dict[str, float | None]
    """Since the last one: train/loss, lr, grad_norm and what `StepTimes.read` gives."""


@dataclass(frozen=True)
class Hooks:
    """What the caller wants to hear; each is called on every rank."""

    on_start: Callable[[Initialisation, int], None] = lambda initialisation, first_epoch: None
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_note: Callable[[str], None] = lambda line: None
    """A line worth knowing: how each split is fed, what went wrong and was mended."""
    on_pace: Callable[[Pace], None] = lambda pace: None
    """About 25 times an epoch."""
    judge: Callable[[Scores], Mapping[str, float | None]] = lambda scores: {}
    """More metrics of an epoch: from all of val's scores, in the store's order, by the weights that
    are scored with."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked each step. One rank's yes ends the run on all, with a checkpoint and
    PreemptedError."""


@dataclass(eq=False)
class _Run:
    """What changes while training, and where it is kept."""

    config: Config
    manifest: Manifest
    image_size: int
    url: str
    learner: Learner
    initialisation: Initialisation
    writer: CheckpointWriter
    history: list[dict[str, float | None]]
    """Of the epochs that are complete."""
    step: int = 0
    """Steps done of the epoch after them."""
    epoch_loss: float = 0.0
    """Sum of those steps' losses."""


def fit(
    config: Config,
    *,
    store_url: str,
    run_url: str,
    world: World,
    device: torch.device,
    hooks: Hooks,
    held: Mapping[str, Held] = MappingProxyType({}),
) -> list[dict[str, float | None]]:
    """Train on the store's train split, judge on val, leave checkpoints and metrics.jsonl in the
    run. Splits that are `held` are not read.

    Goes on after the run's newest checkpoint that is whole, if there is one. Returns the epochs'
    metrics. With `world.size` > 1 torch.distributed must be initialised. Raises RunError,
    StoreError, ConfigError, DataError, CheckpointError, DivergedError, and PreemptedError after
    `hooks.should_stop`.
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
            held=held.get(split),
        )
        for split in ("train", "val")
    )
    run = _begin(config, manifest, image_size, run_url, world, device, hooks)
    first_epoch = len(run.history)
    hooks.on_start(run.initialisation, first_epoch)
    try:
        for epoch in range(first_epoch, config.train.epochs):
            started = time.perf_counter()
            trained = _train_epoch(run, train_data, epoch, hooks)
            if epoch > first_epoch:  # in the first a split may be read into memory
                seconds = time.perf_counter() - started
                _warn_of_slow_data(trained["data_wait"], seconds, epoch, hooks)
            validated = _validate(run.learner, val_data, config, world, hooks)
            taken = {"epoch_s": time.perf_counter() - started}
            record = Epoch(epoch + 1, {"epoch": epoch + 1, **trained, **validated, **taken})
            run.history.append(record.metrics)
            run.step, run.epoch_loss = 0, 0.0
            stopped_early = _is_out_of_patience(run.history, config.train)
            finished = stopped_early or epoch + 1 == config.train.epochs
            _save(run, finished=finished, stopped_early=stopped_early, wait=finished)
            _barrier(world)
            hooks.on_epoch(record)
            if stopped_early:
                hooks.on_note(
                    f"no better val AUROC in {config.train.patience} epochs (train.patience): the "
                    f"run ends after epoch {epoch + 1}"
                )
                break
    finally:
        run.writer.close()
    return run.history


def check_run(config: Config, manifest: Manifest, run_url: str, *, num_workers: int) -> int:
    """What can be known before the first step; the image size to train at.

    Raises RunError when the run is finished or of another configuration or store, and ConfigError
    for sizes that do not fit.
    """
    image_size = check_sizes(config, manifest, num_workers=num_workers)
    index = find_index(run_url)
    if index is None or not index.entries:
        return image_size
    if index.finished:
        raise RunError(
            f"{run_url}: holds a finished run of {index.latest.epoch} epochs; give another --run"
        )
    before = load_newest(run_url, index)
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


def check_sizes(config: Config, manifest: Manifest, *, num_workers: int) -> int:
    """The image size to train at. Raises ConfigError for sizes that do not fit each other or the
    store."""
    train = config.train
    partition.check_batch_size(train.batch_size, train.micro_batch_size, num_workers)
    partition.steps_per_epoch(manifest.splits["train"].samples, train.batch_size)
    return loader.input_size(manifest, config.data.image_size)


def _training_settings(config: Config) -> dict[str, Any]:
    settings = config.model_dump(include=set(TRAINING_SECTIONS))
    train = {name: v for name, v in settings["train"].items() if name not in _NO_MATTER}
    return {**settings, "data": config.data.image_size, "train": train}


def resolve_pos_weight(config: TrainConfig, manifest: Manifest) -> float:
    """The number behind `pos_weight`: negatives / positives of the training split if balanced."""
    if config.pos_weight != "balanced":
        return config.pos_weight
    train = manifest.splits["train"]
    return (train.samples - train.positives) / train.positives


def scored_metric(config: TrainConfig) -> str:
    """The metric that says which epoch is the best: of the averaged weights where there are any."""
    return "val/auroc" if config.ema_decay is None else "val/ema_auroc"


def _begin(
    config: Config,
    manifest: Manifest,
    image_size: int,
    run_url: str,
    world: World,
    device: torch.device,
    hooks: Hooks,
) -> _Run:
    """A fresh run, or one that goes on after its newest whole checkpoint."""
    model = build_model(config.model.backbone)
    index = find_index(run_url)
    before = None
    if index is not None and index.entries:
        before = load_newest(run_url, index, hooks.on_note)
        _load_weights(model, before.model, run_url)
        behind = f" and {before.step} steps" if before.step else ""
        initialisation = Initialisation(
            before.initialisation, f"going on from epoch {before.epoch}{behind} of this run"
        )
    else:
        # Only rank 0 fetches weights; DDP hands them to the others when it wraps the model.
        wanted = (
            config.model
            if world.rank == 0
            else config.model.model_copy(update={"weights": "random"})
        )
        initialisation = initialise(model, wanted, seed=config.seed)
    if config.train.compile and device.type == "cpu":
        hooks.on_note("warning: train.compile: on a CPU compiled steps are rarely faster")
    learner = Learner(
        model,
        config.train,
        pos_weight=resolve_pos_weight(config.train, manifest),
        seed=config.seed,
        world=world,
        device=device,
    )
    writer = CheckpointWriter(hooks.on_note)
    run = _Run(config, manifest, image_size, run_url, learner, initialisation, writer, [])
    if before is not None:
        learner.optimizer.load_state_dict(before.optimizer)
        if learner.average is not None and before.ema is not None:
            _load_weights(learner.average.model, before.ema, run_url)
        run.history = list(before.history)
        run.step, run.epoch_loss = before.step, before.epoch_loss
    return run


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], run_url: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_url}: its newest checkpoint holds the weights of another model"
        ) from error


def _train_epoch(run: _Run, data: Loader, epoch: int, hooks: Hooks) -> dict[str, float | None]:
    """The rest of an epoch; its mean loss over all ranks and how it went.

    Raises DivergedError and PreemptedError.
    """
    config, learner = run.config.train, run.learner
    steps = partition.steps_per_epoch(len(data), config.batch_size)
    report_every = max(steps // _REPORTS_PER_EPOCH, 1)
    times = StepTimes(config.batch_size, data.device)
    outcomes = Outcomes(data.device, loss_sum=run.epoch_loss)
    paces = _Paces(learner, times, outcomes)
    learner.network.train()
    batches = data.epoch(
        epoch,
        seed=run.config.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        augment=run.config.augment,
        start_step=run.step,
    )
    for step, batch in enumerate(times.watch(batches), run.step):
        done = epoch * steps + step
        is_reported = (step + 1) % report_every == 0
        outcome = learner.learn(
            batch,
            epoch=epoch,
            step=step,
            num_steps=done + 1,
            lr=learning_rate(config, done, config.epochs * steps),
            stop=hooks.should_stop(),
            with_norm=is_reported,
        )
        outcomes.put(step, batch.keys, outcome)
        run.step = step + 1
        is_kept = config.checkpoint_every_steps and run.step % config.checkpoint_every_steps == 0
        if outcomes.should_stop or is_kept or run.step == steps:
            outcomes.drain()
        if outcomes.divergence is not None:
            _diverge(run, outcomes.divergence, epoch, learner.world)
        run.epoch_loss = outcomes.loss_sum
        if outcomes.should_stop:
            _leave(run, epoch, learner.world)
        if is_kept and run.step < steps:
            _save(run)
        hooks.on_step(epoch + 1, run.step, steps)
        if is_reported:
            hooks.on_pace(Pace(epoch + 1, run.step, steps, paces.take()))
    learner.optimizer.zero_grad(set_to_none=True)
    return {
        "train/loss": run.epoch_loss / steps,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "grad_norm": paces.norm,
        **times.read(),
    }


class _Paces:
    """How an epoch goes, from one report to the next."""

    def __init__(self, learner: Learner, times: StepTimes, outcomes: Outcomes) -> None:
        self.learner, self.times, self.outcomes = learner, times, outcomes
        self.num_losses = self.num_steps = 0
        """What the reports so far have covered."""
        self.norm: float | None = None
        """Of the gradient, at the latest report."""

    def take(self) -> dict[str, float | None]:
        """What `Pace.metrics` holds."""
        losses = self.outcomes.losses[self.num_losses :]
        norm = self.learner.gradient_norm
        self.norm = None if norm is None else float(norm)
        found = {
            "train/loss": sum(losses) / len(losses) if losses else None,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.norm,
            **self.times.read(self.num_steps),
        }
        self.num_losses, self.num_steps = len(self.outcomes.losses), len(self.times.steps_s)
        return found


def _diverge(run: _Run, divergence: Divergence, epoch: int, world: World) -> None:
    """Leave what the step was made of in the run, and end it."""
    parts: list[Any] = [divergence.keys]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, divergence.keys)
    url = storage.join(run.url, DIVERGED)
    lr = run.learner.optimizer.param_groups[0]["lr"]
    if world.rank == 0:
        facts = {
            "epoch": epoch + 1,
            "step": divergence.step + 1,
            "loss": str(divergence.loss),
            "lr": lr,
            "keys": [key for part in parts for key in part],
        }
        storage.write_text(url, json.dumps(facts, indent=1) + "\n")
    raise DivergedError(
        f"epoch {epoch + 1}, step {divergence.step + 1}: the training loss is {divergence.loss}; "
        f"lower train.lr, now {run.config.train.lr:g}, or set train.clip_norm; the keys of the "
        f"batch are in {url}"
    )


def _leave(run: _Run, epoch: int, world: World) -> None:
    """Write a checkpoint of this very step, and end the run as was asked."""
    _save(run, wait=True)
    _barrier(world)
    raise PreemptedError(
        f"asked to stop: left in epoch {epoch + 1} after step {run.step}, with a checkpoint; start "
        f"again with --run {run.url} to go on"
    )


def _warn_of_slow_data(data_wait: float | None, seconds: float, epoch: int, hooks: Hooks) -> None:
    if data_wait is not None and data_wait > _SLOW_DATA and data_wait * seconds > 1:
        hooks.on_note(
            f"warning: {data_wait:.0%} of epoch {epoch + 1} was spent waiting for data; keep it in "
            "memory (data.cache), or raise data.readers and cluster.cpus_per_worker, or set "
            "data.cache_dir"
        )


def _is_out_of_patience(history: list[dict[str, float | None]], config: TrainConfig) -> bool:
    if config.patience is None:
        return False
    scores = [record[scored_metric(config)] for record in history]
    values = [-1.0 if score is None else score for score in scores]
    return len(values) - 1 - values.index(max(values)) >= config.patience


def _validate(
    learner: Learner, data: Loader, config: Config, world: World, hooks: Hooks
) -> dict[str, float | None]:
    """Metrics of the whole val split by the weights, and by their average where there is one."""
    scores = _score_all(learner.model, data, config, world)
    found = _describe_scores(scores, learner, "val/")
    if learner.average is not None:
        scores = _score_all(learner.average.model, data, config, world)
        found |= _describe_scores(scores, learner, "val/ema_")
    return {**found, **hooks.judge(scores)}


def _score_all(model: nn.Module, data: Loader, config: Config, world: World) -> Scores:
    """What the model says of the whole split, the same on every rank, each study once."""
    batch_size = max(config.train.batch_size // world.size, 1)
    scores = score(model, data.evaluation(batch_size=batch_size))
    parts = [scores]
    if world.size > 1:
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, scores)
        parts = gathered
    # The ranks' shares follow one another in the store's order.
    found = Scores(
        tuple(key for part in parts for key in part.keys),
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.targets for part in parts]),
    )
    studies = len(set(found.keys))
    if len(found.keys) != len(data) or studies != len(data):
        raise DataError(
            f"val: {len(found.keys)} scores of {studies} studies, expected {len(data)} once"
        )
    return found


def _describe_scores(scores: Scores, learner: Learner, prefix: str) -> dict[str, float | None]:
    logits = scores.logits.astype(np.float64)
    loss = F.binary_cross_entropy_with_logits(
        torch.from_numpy(logits),
        torch.from_numpy(scores.targets).double(),
        pos_weight=learner.pos_weight.double().cpu(),
    )
    values = {"loss": float(loss), **metrics.binary_metrics_from_logits(scores.targets, logits)}
    return {f"{prefix}{name}": v if math.isfinite(v) else None for name, v in values.items()}


def _save(
    run: _Run, *, finished: bool = False, stopped_early: bool = False, wait: bool = False
) -> None:
    """Begin to write a checkpoint of where the run is; `wait` returns when it is written, or
    raises."""
    if run.learner.world.rank != 0:
        return
    average = run.learner.average
    checkpoint = Checkpoint(
        model=copy_to_cpu(run.learner.model.state_dict()),
        optimizer=copy_to_cpu(run.learner.optimizer.state_dict()),
        epoch=len(run.history),
        config=run.config,
        manifest_digest=run.manifest.digest,
        image_size=run.image_size,
        mean=run.manifest.mean,
        std=run.manifest.std,
        history=tuple(run.history),
        initialisation=run.initialisation.source,
        code_version=describe_code(),
        ema=None if average is None else copy_to_cpu(average.model.state_dict()),
        step=run.step,
        epoch_loss=run.epoch_loss,
    )
    write = partial(
        _write,
        run.url,
        checkpoint,
        keep_last=run.config.train.keep_checkpoints,
        finished=finished,
        stopped_early=stopped_early,
    )
    run.writer.submit(write)
    if wait:
        run.writer.flush()


def _write(run_url: str, checkpoint: Checkpoint, **marks: Any) -> None:
    """The epochs' metrics, the checkpoint, the index."""
    lines = (json.dumps(record, allow_nan=False) for record in checkpoint.history)
    storage.write_text(storage.join(run_url, METRICS_LOG), "".join(f"{line}\n" for line in lines))
    save_checkpoint(run_url, checkpoint, **marks)


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
