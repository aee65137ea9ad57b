"""fit(): a whole training run, in plain torch and torch.distributed.

The same function runs alone, under torchrun and under Ray Train; the caller passes the rank and is
called back after every epoch. Batches, gradients and BatchNorm's statistics do not depend on the
number of ranks (`train_step.py`): losses and weights agree up to the rounding of sums.
"""

import json
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from pneumo import storage
from pneumo.config import Config
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import CheckpointError, DivergedError, PreemptedError
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.loader import Loader, open_loaders
from pneumo.loading.sample_order import World, steps_per_epoch
from pneumo.network.backbones import Initialisation, build_model, initialise
from pneumo.training.callbacks import Callbacks, Epoch, Metrics, Start, StepProgress
from pneumo.training.checkpoint_content import copy_to_cpu
from pneumo.training.checkpoint_writer import RunWriter
from pneumo.training.checkpoints import AUROC_OF, Checkpoint
from pneumo.training.optimisation import learning_rate
from pneumo.training.preconditions import check_compiler, check_sizes, resolve_pos_weight
from pneumo.training.resuming import Resumption, claim_and_resume
from pneumo.training.step_results import Divergence, EpochTotals, StepResults
from pneumo.training.throughput import SlowData, StepTimes, read_gpu
from pneumo.training.train_step import Learner
from pneumo.training.validation import validate
from pneumo.version import describe_code

DIVERGED = "diverged.json"
_REPORT_INTERVAL_S = 1.0


def fit(
    config: Config,
    *,
    store_url: str,
    run_url: str,
    world: World,
    device: torch.device,
    callbacks: Callbacks,
    shared_splits: Mapping[str, InMemorySplit] = MappingProxyType({}),
    trainings_here: int = 1,
    build_network: Callable[[str], nn.Module] = build_model,
) -> list[Metrics]:
    """Train on the store's train split, validate on val, and write checkpoints and metrics.jsonl to
    the run. Returns the metrics of each epoch.

    Resumes from the run's newest valid checkpoint, if there is one. `shared_splits` are in memory
    already and not read again; `trainings_here` share this machine's memory; `build_network` takes
    the backbone's name and returns a network (B, 1, H, W) -> (B, 1). With `world.size` > 1
    torch.distributed must be initialised. Raises RunError, StoreError, ConfigError, DataError,
    CheckpointError, DivergedError, and PreemptedError after `callbacks.should_stop`.

    >>> history = pneumo.fit(config, store_url=store.url, run_url="run", world=pneumo.World(),
    ...                      device=torch.device("cpu"), callbacks=pneumo.Callbacks())
    """
    device = _prepare_device(config, device, callbacks)
    store = PreparedStore(store_url, read_manifest(store_url), config.data)
    check_sizes(config, store.manifest, num_workers=world.size)
    resumption = claim_and_resume(config, store.manifest, run_url, world, callbacks.tell)
    train_data, val_data = open_loaders(
        store,
        ("train", "val"),
        world=world,
        device=device,
        tell=callbacks.tell,
        shared_splits=shared_splits,
        trainings_here=trainings_here,
        compiled=bool(config.train.compile),
    )
    network = build_network(config.model.backbone)
    initialisation = _initialise(network, config, world, run_url, resumption.checkpoint)
    weight = resolve_pos_weight(config.train, store.manifest)
    learner = Learner(
        network, config.train, pos_weight=weight, seed=config.seed, world=world, device=device
    )
    try:
        run = _Run(config, store, run_url, learner, initialisation, callbacks, resumption)
        return run.complete(train_data, val_data)
    finally:
        learner.statistics.restore_momenta()


def _prepare_device(config: Config, device: torch.device, callbacks: Callbacks) -> torch.device:
    """The device with its index, set as the process's current device. Raises ConfigError."""
    check_compiler(config.train, device, callbacks.tell)
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)  # NCCL uses it for collectives of objects
    torch.backends.cudnn.benchmark = True  # all micro-batches have the same shape
    return device


class _Run:
    """The state of an attempt at a run, and the loop over its epochs."""

    def __init__(
        self,
        config: Config,
        store: PreparedStore,
        url: str,
        learner: Learner,
        initialisation: Initialisation,
        callbacks: Callbacks,
        resumption: Resumption,
    ) -> None:
        self.config, self.store, self.url, self.callbacks = config, store, url, callbacks
        self.learner, self.initialisation = learner, initialisation
        self.steps_per_epoch = steps_per_epoch(
            store.manifest.splits["train"].samples, config.train.batch_size
        )
        self.history: list[Metrics] = []
        """The metrics of each completed epoch."""
        self.totals = EpochTotals()
        """Totals of the current epoch."""
        self.slow_data = SlowData()
        checkpoint = resumption.checkpoint
        if checkpoint is not None:
            self._restore(checkpoint)
        self.writer = RunWriter(
            url,
            resumption.attempt,
            keep_last=config.train.keep_checkpoints,
            tell=callbacks.tell,
            saved_at=None if checkpoint is None else (checkpoint.epoch, checkpoint.step),
        )
        callbacks.on_start(
            Start(initialisation, tuple(self.history), self.totals.step, self.steps_per_epoch)
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything but the model's weights."""
        self.history = list(checkpoint.history)
        self.totals = EpochTotals(
            checkpoint.step, checkpoint.epoch_loss, checkpoint.samples_fed, checkpoint.grad_norm
        )
        self.learner.optimizer.load_state_dict(checkpoint.optimizer)
        average = self.learner.average
        if average is not None and checkpoint.ema is not None:
            _load_weights(average.module, checkpoint.ema, self.url)
            average.n_averaged += checkpoint.epoch * self.steps_per_epoch + checkpoint.step

    @property
    def stopped_early(self) -> bool:
        """Whether val AUROC has not improved for `train.patience` epochs."""
        patience = self.config.train.patience
        if patience is None or not self.history:
            return False
        name = AUROC_OF["raw" if self.config.train.ema_decay is None else "ema"]
        values = [-1.0 if (value := record[name]) is None else value for record in self.history]
        return len(values) - 1 - values.index(max(values)) >= patience

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are trained or the run stopped early."""
        return self.stopped_early or len(self.history) >= self.config.train.epochs

    def complete(self, train_data: Loader, val_data: Loader) -> list[Metrics]:
        """Train until the run is finished; returns and raises what `fit` does."""
        try:
            while not self.is_finished:
                self._complete_epoch(train_data, val_data)
        finally:
            self.writer.close()
        return self.history

    def _complete_epoch(self, train_data: Loader, val_data: Loader) -> None:
        """Train the rest of the current epoch, validate, save, and call `on_epoch`."""
        started_s = time.perf_counter()
        number = len(self.history) + 1
        train_metrics = self._train(train_data)
        if self.writer.is_save_due:
            self._save()
        val_metrics = validate(
            self.learner, val_data, self.config, self.callbacks, image_size=self.store.image_size
        )
        if val_metrics is None:
            self._stop()
        duration = {"epoch_s": time.perf_counter() - started_s}
        epoch = Epoch(number, {"epoch": number, **train_metrics, **val_metrics, **duration})
        self.history.append(epoch.metrics)
        self.totals = EpochTotals()
        self._save(
            finished=self.is_finished, stopped_early=self.stopped_early, wait=self.is_finished
        )
        self._barrier()
        self.callbacks.on_epoch(epoch)
        if self.stopped_early:
            self.callbacks.tell(
                f"no better val AUROC in {self.config.train.patience} epochs (train.patience): the "
                f"run ends after epoch {number}"
            )

    def _train(self, data: Loader) -> Metrics:
        """Train the rest of the current epoch; returns its metrics over all ranks.

        Raises DivergedError and PreemptedError.
        """
        config, learner, epoch = self.config.train, self.learner, len(self.history)
        times = StepTimes(config.batch_size)
        results = StepResults(data.device, self.totals)
        reports = _ProgressReports(learner, times, results)
        learner.network.train()
        batches = data.epoch(
            epoch,
            seed=self.config.seed,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            augment=self.config.augment,
            start_step=self.totals.step,
        )
        num_steps = config.epochs * self.steps_per_epoch
        for step, batch in enumerate(times.watch(batches), self.totals.step):
            is_reported = step + 1 == self.steps_per_epoch or reports.is_due()
            values = learner.learn(
                batch,
                epoch=epoch,
                step=step,
                lr=learning_rate(config, epoch * self.steps_per_epoch + step, num_steps),
                stop=self.callbacks.should_stop(),
                with_norm=is_reported,
            )
            results.put(step, batch.keys, values)
            self._finish_step(results)
            self.callbacks.on_step(epoch + 1, step + 1, self.steps_per_epoch)
            if is_reported:
                progress = StepProgress(epoch + 1, step + 1, self.steps_per_epoch, reports.take())
                self.callbacks.on_progress(progress)
        assert self.totals.samples == self.steps_per_epoch * config.batch_size
        learner.optimizer.zero_grad(set_to_none=True)
        self._warn_of_slow_data(times)
        return {
            "train/loss": self.totals.loss / self.steps_per_epoch,
            "data/samples": self.totals.samples,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.totals.grad_norm,
            **times.read(),
            **read_gpu(self.learner.device),
        }

    def _finish_step(self, results: StepResults) -> None:
        """End the run if it diverged or was asked to stop; save if a checkpoint is due."""
        every = self.config.train.checkpoint_every_steps
        is_save_due = every is not None and self.totals.step % every == 0
        is_last = self.totals.step == self.steps_per_epoch
        if results.should_stop or is_save_due or is_last:  # the same on all ranks
            results.read_all()
        if results.divergence is not None:
            self._diverge(results.divergence)
        self.writer.check()
        if results.should_stop:
            self._stop()
        if is_save_due:
            self._save()

    def _diverge(self, divergence: Divergence) -> NoReturn:
        """Write the facts and the batch's keys to the run, then raise DivergedError."""
        world, epoch = self.learner.world, len(self.history) + 1
        keys_by_rank: list[Any] = [divergence.keys]
        if world.size > 1:
            keys_by_rank = [None] * world.size
            dist.all_gather_object(keys_by_rank, divergence.keys)
        url = storage.join(self.url, DIVERGED)
        if world.rank == 0:
            facts = {
                "epoch": epoch,
                "step": divergence.step + 1,
                "loss": str(divergence.loss),
                "lr": self.learner.optimizer.param_groups[0]["lr"],
                "keys": [key for keys in keys_by_rank for key in keys],
            }
            storage.write_text(url, json.dumps(facts, indent=1) + "\n")
        raise DivergedError(
            f"epoch {epoch}, step {divergence.step + 1}: the training loss is {divergence.loss}; "
            f"give another --run with a lower train.lr, now {self.config.train.lr:g}, or with "
            f"train.clip_norm; the keys of the batch are in {url}"
        )

    def _stop(self) -> NoReturn:
        """Write a checkpoint of the current step, then raise PreemptedError."""
        self._save(wait=True)
        self._barrier()
        raise PreemptedError(
            f"stopped as requested, in epoch {len(self.history) + 1} after step {self.totals.step} "
            f"with a checkpoint; start again with --run {self.url} to resume"
        )

    def _warn_of_slow_data(self, times: StepTimes) -> None:
        fraction = self.slow_data.add(times)
        if fraction is not None:
            self.callbacks.tell(
                f"warning: {fraction:.0%} of the time until epoch {len(self.history) + 1} was "
                "spent waiting for data; keep it in memory (data.cache), or raise "
                "cluster.cpus_per_worker"
            )

    def _save(self, **marks: bool) -> None:
        """Save a checkpoint on rank 0; `marks` are passed to `RunWriter.save`."""
        if self.learner.world.rank == 0:
            position = (len(self.history), self.totals.step)
            self.writer.save(position, self._build_checkpoint, **marks)

    def _build_checkpoint(self) -> Checkpoint:
        learner, manifest, average = self.learner, self.store.manifest, self.learner.average
        return Checkpoint(
            model=copy_to_cpu(learner.model.state_dict()),
            optimizer=copy_to_cpu(learner.optimizer.state_dict()),
            epoch=len(self.history),
            config=self.config,
            manifest_digest=manifest.digest,
            image_size=self.store.image_size,
            mean=manifest.mean,
            std=manifest.std,
            history=tuple(self.history),
            initialisation=self.initialisation.source,
            code_version=describe_code(),
            ema=None if average is None else copy_to_cpu(average.module.state_dict()),
            step=self.totals.step,
            epoch_loss=self.totals.loss,
            grad_norm=self.totals.grad_norm,
            samples_fed=self.totals.samples,
        )

    def _barrier(self) -> None:
        if self.learner.world.size > 1:
            dist.barrier()


class _ProgressReports:
    """Metrics of the steps since the last report."""

    def __init__(self, learner: Learner, times: StepTimes, results: StepResults) -> None:
        self.learner, self.times, self.results = learner, times, results
        self.num_losses = self.num_steps = 0
        """Covered by the reports so far."""
        self.reported_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether to report the next step. Ranks may differ: no collective depends on it."""
        return time.monotonic() - self.reported_s >= _REPORT_INTERVAL_S

    def take(self) -> Metrics:
        """`StepProgress.metrics`. Does not wait: on a GPU they end with the step before."""
        losses = self.results.losses[self.num_losses :]
        found = {
            "train/loss": sum(losses) / len(losses) if losses else None,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.results.totals.grad_norm,
            **self.times.read(self.num_steps),
        }
        self.num_losses, self.num_steps = len(self.results.losses), len(self.times.steps_s)
        self.reported_s = time.monotonic()
        return found


def _initialise(
    model: nn.Module, config: Config, world: World, run_url: str, checkpoint: Checkpoint | None
) -> Initialisation:
    """Load the checkpoint's weights into the model, or initialise it as the settings say."""
    if checkpoint is not None:
        _load_weights(model, checkpoint.model, run_url)
        steps = f" and {checkpoint.step} steps" if checkpoint.step else ""
        message = f"resuming from epoch {checkpoint.epoch}{steps} of this run"
        return Initialisation(checkpoint.initialisation, message)
    # Only rank 0 loads weights; DDP broadcasts them when it wraps the model.
    random = config.model.model_copy(update={"weights": "random"})
    return initialise(model, config.model if world.rank == 0 else random, seed=config.seed)


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], run_url: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_url}: its newest checkpoint has the weights of another model"
        ) from error
