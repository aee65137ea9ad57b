"""Search learning rate and `pos_weight` with Ray Tune; ends with a table and a recipe, best.toml.

A trial of one worker is a plain Tune function around `fit`; a trial of several is a Ray Train run
of its own. Trials at a time are what the cluster's resources allow, so that none waits for
another's.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.tune
import tomli_w
import torch
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from jobs.command import find_cause, new_run_url, run_job, say
from jobs.progress import Progress
from jobs.session import ray_session, uses_gpu, wait_for_resources, worker_resources
from jobs.train import build_trainer, close_tracker, tracking_folder
from pneumo import storage
from pneumo.checkpoint import describe_code
from pneumo.config import Config, Invocation, TuneArguments, override
from pneumo.errors import ClusterError, RunError
from pneumo.partition import World
from pneumo.shards import Manifest, read_manifest
from pneumo.tracking import open_tracker
from pneumo.train import Hooks, check_run, fit

METRIC = "val/auroc"
BEST = "best.toml"
TRIALS = "trials.parquet"
_DRIVER_MEMORY_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Trial:
    """One row of the table."""

    name: str
    lr: float
    pos_weight: float
    val_auroc: float | None
    """The best epoch's; None when there was no epoch."""
    epochs: int
    seconds: float
    error: str | None


def tune(invocation: Invocation) -> None:
    """Search on `--store`, leaving trials.parquet and best.toml in `--run`."""
    arguments, config = invocation.arguments, invocation.config
    assert isinstance(arguments, TuneArguments)
    store_url = storage.normalise(arguments.store)
    run_url = storage.normalise(arguments.run) if arguments.run else new_run_url("tune")
    manifest = read_manifest(store_url)
    if storage.exists(storage.join(run_url, BEST)):
        raise RunError(f"{run_url}: holds a finished search; give another --run")
    check_run(
        trial_config(config, {}), manifest, run_url, num_workers=config.tune.workers_per_trial
    )
    storage.write_text(storage.join(run_url, "config.json"), config.to_json())
    with ray_session(show_logs=arguments.debug):
        trials = search(config, manifest, store_url, run_url)
    print_table(trials)
    print(f"recipe {storage.join(run_url, BEST)}")
    say(f"next: python -m jobs.train --store {store_url} --recipe {storage.join(run_url, BEST)}")


def search(config: Config, manifest: Manifest, store_url: str, run_url: str) -> list[Trial]:
    """Run the trials in the Ray session that is open; write the table and the recipe; best
    first."""
    wait_for_resources(config.cluster, config.tune.workers_per_trial)
    at_once = trials_at_once(config, ray.cluster_resources())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the table tells of failed trials
    say(
        f"tune: {config.tune.num_trials} trials of {config.tune.epochs} epochs, {at_once} at a time"
    )
    with Progress("tune", config.tune.num_trials * config.tune.epochs, "epochs") as progress:
        results = ray.tune.Tuner(
            _trainable(config, store_url, run_url),
            param_space=search_space(config),
            tune_config=ray.tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=config.tune.num_trials,
                max_concurrent_trials=at_once,
                reuse_actors=config.tune.workers_per_trial == 1,
                search_alg=OptunaSearch(seed=config.seed),
                scheduler=_scheduler(config),
            ),
            run_config=ray.tune.RunConfig(
                name="ray", storage_path=run_url, verbose=0, callbacks=[_Narrator(progress, config)]
            ),
        ).fit()
    trials = collect_trials(results)
    if trials[0].val_auroc is None:
        cause = next((find_cause(e) for e in results.errors if find_cause(e)), None)
        raise cause or ClusterError(f"tune: every trial failed, the first with: {trials[0].error}")
    _write_results(config, manifest, trials, run_url)
    for url in storage.list_urls(storage.join(run_url, "trials")):
        if "/checkpoints/" in url:  # the recipe is the result; a trial's weights are not
            storage.remove(url)
    return trials


def search_space(config: Config) -> dict[str, Any]:
    """Dotted keys and how they are drawn: uniform in the logarithm, or fixed where low is high."""

    def draw(low: float, high: float) -> Any:
        return low if low == high else ray.tune.loguniform(low, high)

    return {
        "train.lr": draw(config.tune.lr_low, config.tune.lr_high),
        "train.pos_weight": draw(config.tune.pos_weight_low, config.tune.pos_weight_high),
    }


def trial_config(config: Config, drawn: Mapping[str, Any]) -> Config:
    """The configuration of one trial: shorter, and with what was drawn."""
    changes = {
        "train.epochs": config.tune.epochs,
        "train.keep_checkpoints": 1,
        "cluster.num_workers": config.tune.workers_per_trial,
        **drawn,
    }
    return override(config, changes)


def trials_at_once(config: Config, resources: Mapping[str, float]) -> int:
    """How many trials fit into the cluster with all their workers, so that none waits for ever.

    Raises ClusterError when not one fits.
    """
    workers = config.tune.workers_per_trial
    wanted = {"CPU": float(config.cluster.cpus_per_worker)}
    if config.cluster.use_gpu is True or (
        config.cluster.use_gpu == "auto" and resources.get("GPU", 0) >= 1
    ):
        wanted["GPU"] = 1.0
    fits = min(int(resources.get(name, 0) // (value * workers)) for name, value in wanted.items())
    if fits < 1:
        asked = ", ".join(f"{value * workers:g} {name}" for name, value in wanted.items())
        there = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        raise ClusterError(
            f"tune: a trial of {workers} workers needs {asked}, the cluster has {there}; lower "
            "--tune.workers-per-trial or add nodes"
        )
    return min(fits, config.tune.num_trials)


def collect_trials(results: ray.tune.ResultGrid) -> list[Trial]:
    """The table, best first, failed trials last."""
    trials = []
    for result in results:
        epochs = result.metrics_dataframe
        scores = list(epochs[METRIC]) if epochs is not None and METRIC in epochs else []
        drawn = result.config or {}
        trials.append(
            Trial(
                name=(result.metrics or {}).get("trial_id", "?"),
                lr=float(drawn["train.lr"]),
                pos_weight=float(drawn["train.pos_weight"]),
                val_auroc=max(scores) if scores else None,
                epochs=len(scores),
                seconds=float((result.metrics or {}).get("time_total_s", math.nan)),
                error=None if result.error is None else _describe(result.error),
            )
        )
    return sorted(trials, key=lambda t: (t.val_auroc is None, -(t.val_auroc or 0.0)))


def print_table(trials: Sequence[Trial]) -> None:
    """The trials on stdout, best first."""
    print("trial       lr          pos_weight  val AUROC  epochs")
    for trial in trials:
        score = "failed" if trial.val_auroc is None else f"{trial.val_auroc:.3f}"
        print(
            f"{trial.name:10}  {trial.lr:<10.3g}  {trial.pos_weight:<10.3g}  {score:<9}  "
            f"{trial.epochs:<6} {trial.error or ''}".rstrip()
        )


def make_recipe(config: Config, best: Trial) -> dict[str, Any]:
    """The search's configuration with the best trial's draws, as differences from the defaults."""
    chosen = override(config, {"train.lr": best.lr, "train.pos_weight": best.pos_weight})
    defaults = Config()
    recipe: dict[str, Any] = {} if chosen.seed == defaults.seed else {"seed": chosen.seed}
    for section in ("data", "augment", "model", "train"):
        values, usual = getattr(chosen, section), getattr(defaults, section)
        differences = {
            name: value
            for name, value in values.model_dump(mode="json").items()
            if value != getattr(usual, name)
        }
        if differences:
            recipe[section] = differences
    return recipe


def _trainable(config: Config, store_url: str, run_url: str) -> Any:
    """What Tune runs for each trial, with the resources it reserves."""
    settings = {
        "config": config.model_dump(mode="json"),
        "store_url": store_url,
        "run_url": run_url,
    }
    several = config.tune.workers_per_trial > 1
    trainable = ray.tune.with_parameters(
        _run_trial_on_workers if several else _run_trial_here, settings=settings
    )
    # The trial of several workers only waits for them; a CPU for it could starve them for ever.
    resources = {"memory": _DRIVER_MEMORY_BYTES} if several else worker_resources(config.cluster)
    return ray.tune.with_resources(trainable, resources)


def _run_trial_here(drawn: dict[str, Any], settings: dict[str, Any]) -> None:
    config = trial_config(Config.model_validate(settings["config"]), drawn)
    torch.set_num_threads(config.cluster.cpus_per_worker)
    fit(
        config,
        store_url=settings["store_url"],
        run_url=_trial_url(settings["run_url"]),
        world=World(),
        device=torch.device("cuda" if uses_gpu(config.cluster) else "cpu"),
        hooks=Hooks(on_epoch=lambda epoch: ray.tune.report(dict(epoch.metrics))),
    )


def _run_trial_on_workers(drawn: dict[str, Any], settings: dict[str, Any]) -> None:
    config = trial_config(Config.model_validate(settings["config"]), drawn)
    trial_url = _trial_url(settings["run_url"])
    callbacks = [TuneReportCallback()]
    build_trainer(config, settings["store_url"], trial_url, None, callbacks).fit()


def _trial_url(run_url: str) -> str:
    return storage.join(run_url, "trials", ray.tune.get_context().get_trial_id())


def _scheduler(config: Config) -> Any:
    if not config.tune.early_stopping:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        max_t=config.tune.epochs,
        grace_period=max(config.tune.epochs // 4, 1),
        reduction_factor=3,
    )


class _Narrator(ray.tune.Callback):  # type: ignore[misc]
    """Turns Tune's events into progress and one line a trial."""

    def __init__(self, progress: Progress, config: Config) -> None:
        self.progress, self.config = progress, config
        self.epochs: dict[str, int] = {}
        self.best: dict[str, float] = {}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.epochs[trial.trial_id] = int(result["epoch"])
        self.best[trial.trial_id] = max(self.best.get(trial.trial_id, 0.0), result[METRIC])
        self.progress.advance_to(sum(self.epochs.values()))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        epochs = self.epochs.get(trial.trial_id, 0)
        stopped = " (stopped early)" if epochs < self.config.tune.epochs else ""
        self.epochs[trial.trial_id] = self.config.tune.epochs
        self.progress.write(
            f"trial {trial.trial_id}  lr {trial.config['train.lr']:.3g}  pos_weight "
            f"{trial.config['train.pos_weight']:.3g}  val AUROC "
            f"{self.best.get(trial.trial_id, math.nan):.3f}  after {epochs} epochs{stopped}"
        )

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.epochs[trial.trial_id] = self.config.tune.epochs
        self.progress.write(f"trial {trial.trial_id} failed; the search goes on")


def _describe(error: BaseException) -> str:
    cause = find_cause(error) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


def _write_results(
    config: Config, manifest: Manifest, trials: Sequence[Trial], run_url: str
) -> None:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(trial) for trial in trials]), table)
    storage.write_bytes(storage.join(run_url, TRIALS), table.getvalue())
    _track(config, manifest, trials, run_url)
    best = trials[0]
    head = (
        f"# Found by jobs.tune: the best of {len(trials)} trials of {config.tune.epochs} epochs, "
        f"val AUROC {best.val_auroc:.3f}.\n"
        f"# Run {run_url.rsplit('/', 1)[-1]}, trial {best.name}, data set {manifest.digest[:12]}, "
        f"code {describe_code()}.\n"
    )
    recipe = tomli_w.dumps(make_recipe(config, best))
    storage.write_text(storage.join(run_url, BEST), head + recipe)


def _track(config: Config, manifest: Manifest, trials: Sequence[Trial], run_url: str) -> None:
    tracker = open_tracker(
        config.tracking,
        run_dir=tracking_folder(run_url),
        name=run_url.rsplit("/", 1)[-1],
        job_type="tune",
        group=config.tracking.group,
        settings={
            **config.model_dump(mode="json"),
            "dataset_digest": manifest.digest,
            "data_warning": manifest.audit.warning,
        },
    )
    best = trials[0]
    tracker.summarise(
        {"best/lr": best.lr, "best/pos_weight": best.pos_weight, "best/val_auroc": best.val_auroc}
    )
    close_tracker(tracker, run_url)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("tune", tune, argv)


if __name__ == "__main__":
    sys.exit(main())
