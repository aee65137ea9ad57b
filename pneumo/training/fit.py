"""fit(): plain torch and torch.distributed. Read it from top to bottom and know what a run does.

The same function runs alone, under torchrun and under Ray Train; who calls it says which rank this
is and hears of every epoch. Batches, gradients and BatchNorm's statistics do not depend on the
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
from pneumo.training.checkpoint_writer import RunWriter
from pneumo.training.checkpoints import AUROC_OF, Checkpoint, copy_to_cpu
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
    build_network: Callable[[str], nn.Module] = build_model,
) -> list[Metrics]:
    """Train on the store's train split, validate on val, leave checkpoints and metrics.jsonl in the
    run; the epochs' metrics. `shared_splits` are not read; `build_network` gets the backbone's name
    and gives a network (B, 1, H, W) -> (B, 1).

    Goes on after the run's newest checkpoint that is whole, if there is one. With `world.size` > 1
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
        compiled=bool(config.train.compile),
    )
    network = build_network(config.model.backbone)
    initialisation = _initialise(network, config, world, run_url, resumption.checkpoint)
    weight = resolve_pos_weight(config.train, store.manifest)
    learner = Learner(
        network, config.train, pos_weight=weight, seed=config.seed, world=world, device=device
    )
    run = _Run(config, store, run_url, learner, initialisation, callbacks, resumption)
    return run.complete(train_data, val_data)


def _prepare_device(config: Config, device: torch.device, callbacks: Callbacks) -> torch.device:
    """The device with its number, made the process's own. Raises ConfigError."""
    check_compiler(config.train, device, callbacks.tell)
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)  # what NCCL takes for collectives of objects
    torch.backends.cudnn.benchmark = True  # micro-batches are all of one shape
    return device


class _Run:
    """An attempt at a run: what changes while it trains, and where that is kept."""

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
        """Of the epochs that are complete."""
        self.totals = EpochTotals()
        """Of the steps done of the epoch after them."""
        self.slow_data = SlowData()
        before = resumption.checkpoint
        if before is not None:
            self._restore(before)
        self.writer = RunWriter(
            url,
            resumption.attempt,
            keep_last=config.train.keep_checkpoints,
            tell=callbacks.tell,
            begun_at=None if before is None else (before.epoch, before.step),
        )
        callbacks.on_start(
            Start(initialisation, tuple(self.history), self.totals.step, self.steps_per_epoch)
        )

    def _restore(self, before: Checkpoint) -> None:
        """Take over all that is not in the model."""
        self.history = list(before.history)
        self.totals = EpochTotals(
            before.step, before.epoch_loss, before.samples_fed, before.grad_norm
        )
        self.learner.optimizer.load_state_dict(before.optimizer)
        average = self.learner.average
        if average is not None and before.ema is not None:
            _load_weights(average.module, before.ema, self.url)
            average.n_averaged += before.epoch * self.steps_per_epoch + before.step

    @property
    def stopped_early(self) -> bool:
        """Whether `train.patience` epochs have brought nothing better."""
        patience = self.config.train.patience
        if patience is None or not self.history:
            return False
        name = AUROC_OF["raw" if self.config.train.ema_decay is None else "ema"]
        values = [-1.0 if (value := record[name]) is None else value for record in self.history]
        return len(values) - 1 - values.index(max(values)) >= patience

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.stopped_early or len(self.history) >= self.config.train.epochs

    def complete(self, train_data: Loader, val_data: Loader) -> list[Metrics]:
        """Train until the run is finished; the epochs' metrics. Raises as `fit`."""
        try:
            while not self.is_finished:
                self._complete_epoch(train_data, val_data)
        finally:
            self.writer.close()
        return self.history

    def _complete_epoch(self, train_data: Loader, val_data: Loader) -> None:
        """Train the rest of an epoch, validate, save, tell."""
        started_s = time.perf_counter()
        number = len(self.history) + 1
        trained = self._train(train_data)
        if self.writer.is_worth_saving:
            self._save()
        validated = validate(self.learner, val_data, self.config, self.callbacks)
        if validated is None:
            self._stop()
        taken = {"epoch_s": time.perf_counter() - started_s}
        record = Epoch(number, {"epoch": number, **trained, **validated, **taken})
        self.history.append(record.metrics)
        self.totals = EpochTotals()
        self._save(
            finished=self.is_finished, stopped_early=self.stopped_early, wait=self.is_finished
        )
        self._barrier()
        self.callbacks.on_epoch(record)
        if self.stopped_early:
            self.callbacks.tell(
                f"no better val AUROC in {self.config.train.patience} epochs (train.patience): the "
                f"run ends after epoch {number}"
            )

    def _train(self, data: Loader) -> Metrics:
        """The rest of an epoch; its mean loss over all ranks and how it went.

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
            self._act_on(results)
            self.callbacks.on_step(epoch + 1, step + 1, self.steps_per_epoch)
            if is_reported:
                progress = StepProgress(epoch + 1, step + 1, self.steps_per_epoch, reports.take())
                self.callbacks.on_progress(progress)
        assert self.totals.samples == self.steps_per_epoch * config.batch_size
        learner.optimizer.zero_grad(set_to_none=True)
        self._warn_of_slow_data(times)
        return self._describe_epoch(times)

    def _describe_epoch(self, times: StepTimes) -> Metrics:
        return {
            "train/loss": self.totals.loss / self.steps_per_epoch,
            "data/samples": self.totals.samples,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.totals.grad_norm,
            **times.read(),
            **read_gpu(self.learner.device),
        }

    def _act_on(self, results: StepResults) -> None:
        """After a step: end the run where it diverged or is asked to stop, save where it is due."""
        every = self.config.train.checkpoint_every_steps
        is_saved = every is not None and self.totals.step % every == 0
        is_last = self.totals.step == self.steps_per_epoch
        if results.should_stop or is_saved or is_last:  # the same on all ranks
            results.read_all()
        if results.divergence is not None:
            self._diverge(results.divergence)
        self.writer.check()
        if results.should_stop:
            self._stop()
        if is_saved:
            self._save()

    def _diverge(self, divergence: Divergence) -> NoReturn:
        """Leave what the step was made of in the run, and end it."""
        world, epoch = self.learner.world, len(self.history) + 1
        parts: list[Any] = [divergence.keys]
        if world.size > 1:
            parts = [None] * world.size
            dist.all_gather_object(parts, divergence.keys)
        url = storage.join(self.url, DIVERGED)
        if world.rank == 0:
            facts = {
                "epoch": epoch,
                "step": divergence.step + 1,
                "loss": str(divergence.loss),
                "lr": self.learner.optimizer.param_groups[0]["lr"],
                "keys": [key for part in parts for key in part],
            }
            storage.write_text(url, json.dumps(facts, indent=1) + "\n")
        raise DivergedError(
            f"epoch {epoch}, step {divergence.step + 1}: the training loss is {divergence.loss}; "
            f"give another --run with a lower train.lr, now {self.config.train.lr:g}, or with "
            f"train.clip_norm; the keys of the batch are in {url}"
        )

    def _stop(self) -> NoReturn:
        """Write a checkpoint of this very step, and end the run as was asked."""
        self._save(wait=True)
        self._barrier()
        raise PreemptedError(
            f"asked to stop: left in epoch {len(self.history) + 1} after step {self.totals.step}, "
            f"with a checkpoint; start again with --run {self.url} to go on"
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
        """Have rank 0 save where the run is; `marks` are those of `RunWriter.save`."""
        if self.learner.world.rank == 0:
            position = (len(self.history), self.totals.step)
            self.writer.save(position, self._take_checkpoint, **marks)

    def _take_checkpoint(self) -> Checkpoint:
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
    """How an epoch goes, from one report to the next."""

    def __init__(self, learner: Learner, times: StepTimes, results: StepResults) -> None:
        self.learner, self.times, self.results = learner, times, results
        self.num_losses = self.num_steps = 0
        """What the reports so far have covered."""
        self.taken_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether the next step is to be reported. Ranks may differ: nothing that they have in
        common depends on it."""
        return time.monotonic() - self.taken_s >= _REPORT_INTERVAL_S

    def take(self) -> Metrics:
        """`StepProgress.metrics`. Waits for nothing: on a GPU it is of the step before."""
        losses = self.results.losses[self.num_losses :]
        found = {
            "train/loss": sum(losses) / len(losses) if losses else None,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": self.results.totals.grad_norm,
            **self.times.read(self.num_steps),
        }
        self.num_losses, self.num_steps = len(self.results.losses), len(self.times.steps_s)
        self.taken_s = time.monotonic()
        return found


def _initialise(
    model: nn.Module, config: Config, world: World, run_url: str, before: Checkpoint | None
) -> Initialisation:
    """Fill the model with the weights that the attempt begins with."""
    if before is not None:
        _load_weights(model, before.model, run_url)
        behind = f" and {before.step} steps" if before.step else ""
        message = f"going on from epoch {before.epoch}{behind} of this run"
        return Initialisation(before.initialisation, message)
    # Only rank 0 fetches weights; DDP hands them to the others when it wraps the model.
    random = config.model.model_copy(update={"weights": "random"})
    return initialise(model, config.model if world.rank == 0 else random, seed=config.seed)


def _load_weights(model: nn.Module, weights: dict[str, torch.Tensor], run_url: str) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{run_url}: its newest checkpoint holds the weights of another model"
        ) from error
