"""fit(): plain torch and torch.distributed. Read it from top to bottom and know what a run does.

The same function runs alone, under torchrun and under Ray Train; who calls it says which rank this
is and hears of every epoch. Batches, gradients and BatchNorm's statistics do not depend on the
number of ranks (`learner.py`): losses and weights agree up to the rounding of sums.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from pneumo import loader, partition, storage
from pneumo.checkpoint import Checkpoint, copy_to_cpu, describe_code
from pneumo.config import Config, TrainConfig, check_batch_size
from pneumo.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    PreemptedError,
)
from pneumo.feeds import Held
from pneumo.hooks import Epoch, Hooks, Pace, Start
from pneumo.keeping import Keeper
from pneumo.learner import Learner
from pneumo.loader import Loader
from pneumo.model import Initialisation, build_model, check_weights, initialise
from pneumo.optimise import learning_rate
from pneumo.outcomes import Divergence, Outcomes
from pneumo.partition import World
from pneumo.resumption import Resumption, find_last, take_up
from pneumo.shards import Manifest, read_manifest
from pneumo.tally import Tally
from pneumo.timing import SlowData, StepTimes, read_gpu
from pneumo.validation import validate

DIVERGED = "diverged.json"
_REPORT_INTERVAL_S = 1.0


@dataclass(eq=False)
class _Run:
    """What changes while training, and where it is kept."""

    config: Config
    manifest: Manifest
    image_size: int
    url: str
    learner: Learner
    initialisation: Initialisation
    keeper: Keeper
    history: list[dict[str, float | None]]
    """Of the epochs that are complete."""
    step: int = 0
    """Steps done of the epoch after them."""
    epoch_loss: float = 0.0
    """Sum of those steps' losses."""
    grad_norm: float | None = None
    """Of the gradient, when it was last taken in the epoch."""
    tally: Tally = field(default_factory=Tally)
    """What this rank's part of those steps was fed; on rank 0 with what was fed before it began."""
    fed: Tally = field(default_factory=Tally)
    """The same over all ranks, when it was last added up."""
    slow_data: SlowData = field(default_factory=SlowData)


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
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # what NCCL takes for collectives of objects
        torch.backends.cudnn.benchmark = True  # micro-batches are all of one shape
    _check_compiler(config.train)
    manifest = read_manifest(store_url)
    image_size = check_sizes(config, manifest, num_workers=world.size)
    resumption = take_up(config, manifest, run_url, world, hooks.on_note)
    train_data, val_data = loader.open_loaders(
        store_url,
        manifest,
        ("train", "val"),
        config.data,
        image_size=image_size,
        mean=manifest.mean,
        std=manifest.std,
        world=world,
        device=device,
        tell=hooks.on_note,
        held=held,
        compiled=bool(config.train.compile),
    )
    run = _begin(config, manifest, image_size, run_url, world, device, hooks, resumption)
    first_epoch = len(run.history)
    steps = partition.steps_per_epoch(len(train_data), config.train.batch_size)
    hooks.on_start(Start(run.initialisation, tuple(run.history), run.step, steps))
    try:
        for epoch in range(first_epoch, config.train.epochs):
            started = time.perf_counter()
            trained = _train_epoch(run, train_data, epoch, hooks)
            if run.keeper.is_worth_saving:
                _save(run)
            validated = validate(
                run.learner, val_data, config, world, hooks.should_stop, hooks.judge
            )
            if validated is None:
                _leave(run, epoch, world)
            taken = {"epoch_s": time.perf_counter() - started}
            record = Epoch(epoch + 1, {"epoch": epoch + 1, **trained, **validated, **taken})
            run.history.append(record.metrics)
            run.step, run.epoch_loss, run.grad_norm = 0, 0.0, None
            run.tally = run.fed = Tally()
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
        run.keeper.close()
    return run.history


def check_run(config: Config, manifest: Manifest, run_url: str, *, num_workers: int) -> int:
    """What can be known before the first step; the image size to train at.

    Raises RunError when the run is finished or of another configuration or store, and ConfigError
    for sizes that do not fit, a training split of one class, and weights that a fresh run could not
    begin with.
    """
    image_size = check_sizes(config, manifest, num_workers=num_workers)
    if find_last(config, manifest, run_url) is None:
        check_weights(config.model)
    return image_size


def check_sizes(config: Config, manifest: Manifest, *, num_workers: int) -> int:
    """The image size to train at. Raises ConfigError for sizes that do not fit each other or the
    store, and for a training split of one class."""
    image_size = loader.input_size(manifest, config.data.image_size)
    train = config.train
    check_batch_size(train.batch_size, train.micro_batch_size, num_workers)
    partition.steps_per_epoch(manifest.splits["train"].samples, train.batch_size)
    resolve_pos_weight(train, manifest)
    return image_size


def resolve_pos_weight(config: TrainConfig, manifest: Manifest) -> float:
    """The number behind `pos_weight`: negatives / positives of the training split if balanced.

    Raises ConfigError where one of the two is none.
    """
    if config.pos_weight != "balanced":
        return config.pos_weight
    train = manifest.splits["train"]
    if not 0 < train.positives < train.samples:
        raise ConfigError(
            f"train.pos_weight: balanced needs both classes, and {train.positives} of the "
            f"{train.samples} studies of the training split are positive; give a number, or "
            "prepare a store with both"
        )
    return (train.samples - train.positives) / train.positives


def scored_metric(config: TrainConfig) -> str:
    """The metric that says which epoch is the best: of the averaged weights where there are any."""
    return "val/auroc" if config.ema_decay is None else "val/ema_auroc"


def has_compiler() -> bool:
    """Whether this machine has the C compiler that torch.compile calls."""
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang", "cc"))


def _check_compiler(config: TrainConfig) -> None:
    """Raise ConfigError where the network is to be compiled and nothing here can."""
    if config.compile and not has_compiler():
        raise ConfigError(
            "train.compile: torch.compile needs a C compiler on every worker, and here is none of "
            "gcc, clang, cc; install one, or say --train.compile false"
        )


def _begin(
    config: Config,
    manifest: Manifest,
    image_size: int,
    run_url: str,
    world: World,
    device: torch.device,
    hooks: Hooks,
    resumption: Resumption,
) -> _Run:
    """A fresh run, or one that goes on where `resumption` says."""
    model = build_model(config.model.backbone)
    before = resumption.before
    if before is not None:
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
    run = _Run(
        config=config,
        manifest=manifest,
        image_size=image_size,
        url=run_url,
        learner=learner,
        initialisation=initialisation,
        keeper=Keeper(
            run_url,
            resumption.attempt,
            keep_last=config.train.keep_checkpoints,
            tell=hooks.on_note,
            begun_at=None if before is None else (before.epoch, before.step),
        ),
        history=[],
    )
    if before is not None:
        learner.optimizer.load_state_dict(before.optimizer)
        if learner.average is not None and before.ema is not None:
            _load_weights(learner.average.model, before.ema, run_url)
        run.history = list(before.history)
        run.step, run.epoch_loss = before.step, before.epoch_loss
        run.grad_norm = before.grad_norm
        run.fed = Tally(before.samples_fed, before.digest_fed)
        run.tally = run.fed if world.rank == 0 else Tally()
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
    times = StepTimes(config.batch_size)
    outcomes = Outcomes(data.device, loss_sum=run.epoch_loss, grad_norm=run.grad_norm)
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
        is_reported = step + 1 == steps or paces.is_due()
        outcome = learner.learn(
            batch,
            epoch=epoch,
            step=step,
            num_steps=done + 1,
            lr=learning_rate(config, done, config.epochs * steps),
            stop=hooks.should_stop(),
            with_norm=is_reported,
        )
        outcomes.put(step, batch.keys, outcome, learner.gradient_norm)
        run.step = step + 1
        is_kept = config.checkpoint_every_steps and run.step % config.checkpoint_every_steps == 0
        run.tally = run.tally.add(
            batch.keys,
            epoch=epoch,
            step=step,
            micro_batches=learner.mine,
            micro_batch_size=config.micro_batch_size,
        )
        if outcomes.should_stop or is_kept or run.step == steps:  # the same on all ranks
            outcomes.drain()
            run.fed = run.tally.total(learner.world, data.device)
        if outcomes.divergence is not None:
            _diverge(run, outcomes.divergence, epoch, learner.world)
        run.epoch_loss, run.grad_norm = outcomes.loss_sum, outcomes.grad_norm
        run.keeper.check()
        if outcomes.should_stop:
            _leave(run, epoch, learner.world)
        if is_kept:
            _save(run)
        hooks.on_step(epoch + 1, run.step, steps)
        if is_reported:
            hooks.on_pace(Pace(epoch + 1, run.step, steps, paces.take()))
    learner.optimizer.zero_grad(set_to_none=True)
    _warn_of_slow_data(run.slow_data.add(times), epoch, hooks)
    if run.fed.samples != steps * config.batch_size:
        raise DataError(
            f"epoch {epoch + 1}: fed {run.fed.samples} samples, expected {steps} steps of "
            f"{config.batch_size}"
        )
    return {
        "train/loss": run.epoch_loss / steps,
        "data/samples": run.fed.samples,
        "data/digest": run.fed.digest,
        "lr": learner.optimizer.param_groups[0]["lr"],
        "grad_norm": run.grad_norm,
        **times.read(),
        **read_gpu(data.device),
    }


class _Paces:
    """How an epoch goes, from one report to the next."""

    def __init__(self, learner: Learner, times: StepTimes, outcomes: Outcomes) -> None:
        self.learner, self.times, self.outcomes = learner, times, outcomes
        self.num_losses = self.num_steps = 0
        """What the reports so far have covered."""
        self.taken_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether the next step is to be reported. Ranks may differ: nothing that they share
        depends on it."""
        return time.monotonic() - self.taken_s >= _REPORT_INTERVAL_S

    def take(self) -> dict[str, float | None]:
        """What `Pace.metrics` holds. Waits for nothing: on a GPU it is as of the step before."""
        losses = self.outcomes.losses[self.num_losses :]
        found = {
            "train/loss": sum(losses) / len(losses) if losses else None,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.outcomes.grad_norm,
            **self.times.read(self.num_steps),
        }
        self.num_losses, self.num_steps = len(self.outcomes.losses), len(self.times.steps_s)
        self.taken_s = time.monotonic()
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
        f"give another --run with a lower train.lr, now {run.config.train.lr:g}, or with "
        f"train.clip_norm; the keys of the batch are in {url}"
    )


def _leave(run: _Run, epoch: int, world: World) -> NoReturn:
    """Write a checkpoint of this very step, and end the run as was asked."""
    _save(run, wait=True)
    _barrier(world)
    raise PreemptedError(
        f"asked to stop: left in epoch {epoch + 1} after step {run.step}, with a checkpoint; start "
        f"again with --run {run.url} to go on"
    )


def _warn_of_slow_data(share: float | None, epoch: int, hooks: Hooks) -> None:
    if share is not None:
        hooks.on_note(
            f"warning: {share:.0%} of the time until epoch {epoch + 1} was spent waiting for data; "
            "keep it in memory (data.cache), or raise data.readers and cluster.cpus_per_worker, or "
            "set data.cache_dir"
        )


def _is_out_of_patience(history: list[dict[str, float | None]], config: TrainConfig) -> bool:
    if config.patience is None:
        return False
    scores = [record[scored_metric(config)] for record in history]
    values = [-1.0 if score is None else score for score in scores]
    return len(values) - 1 - values.index(max(values)) >= config.patience


def _save(run: _Run, **marks: bool) -> None:
    """Have rank 0 keep where the run is; `marks` are those of `Keeper.save`."""
    if run.learner.world.rank == 0:
        run.keeper.save((len(run.history), run.step), partial(_take_checkpoint, run), **marks)


def _take_checkpoint(run: _Run) -> Checkpoint:
    average = run.learner.average
    return Checkpoint(
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
        grad_norm=run.grad_norm,
        samples_fed=run.fed.samples,
        digest_fed=run.fed.digest,
    )


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
