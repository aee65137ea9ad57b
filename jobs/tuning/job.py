"""Search settings with Ray Tune; writes a table, a page and, last, a recipe, best.toml.

After an interruption the same command resumes the search: ended trials are kept, the others resume
from their checkpoints. As many trials run at a time as fit into the cluster with all their workers,
so that none waits for the workers of another.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler

from jobs.joined_store import open_store
from jobs.ray_cluster.session import ray_session, uses_gpu, wait_for_resources
from jobs.terminal.entry_point import find_cause, find_run_url, tell
from jobs.tracking.sending import sending_to_wandb
from jobs.tuning.live_table import LiveTable
from jobs.tuning.search_results import print_search, write_results
from jobs.tuning.search_wandb import BEST, REPORT
from jobs.tuning.searchers import (
    FixedListSearcher,
    OptunaSearcher,
    PlannedTrial,
    ResumableAsha,
    RoomLimiter,
    list_grid,
)
from jobs.tuning.trial_judge import SharedTrialData
from jobs.tuning.trial_lines import TrialLines
from jobs.tuning.trial_records import (
    drop_checkpoints,
    read_estimate,
    read_trial,
    read_trials,
    trial_config,
    trial_url,
    write_ended,
)
from jobs.tuning.trial_runs import load_shared_data, make_trainable, max_concurrent_trials
from pneumo import storage
from pneumo.command_line import Invocation, TuneArguments
from pneumo.config import Config, ModelConfig
from pneumo.config_layers import check_space, drop_removed
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.errors import ClusterError, ConfigError, RunError
from pneumo.network.backbones import check_weights
from pneumo.reporting.tracking.tracked_run import prepare_tracking
from pneumo.search_space import flatten
from pneumo.storage.arrow import open_for_ray
from pneumo.training.checkpoints import find_weights
from pneumo.training.preconditions import check_sizes
from pneumo.tuning.choice import (
    SettingChoice,
    choose_confirmed,
    choose_setting,
    measure_simplicity,
    settings_to_confirm,
    summarise_seeds,
)
from pneumo.tuning.objective import chance_level, describe_objective
from pneumo.tuning.optuna_study import measure_importance
from pneumo.tuning.search import Search
from pneumo.tuning.trials import Trial, sort_trials

_IDENTITY = "search.json"
_SAME = ("seed", "data", "augment", "model", "train", "tune")
"""Sections of the settings that must not change when a search is resumed."""


def tune(invocation: Invocation) -> None:
    """Search on `--store`; writes trials.parquet, report.html and best.toml to `--run`."""
    arguments, config = invocation.arguments, find_weights(invocation.config)
    assert isinstance(arguments, TuneArguments)
    run_url = find_run_url("tune", arguments.run)
    store_url = open_store(arguments, run_url, seed=config.seed)
    manifest = read_manifest(store_url)
    check_search(config, manifest)
    begin(config, manifest, run_url)
    storage.write_text(storage.join(run_url, "config.json"), config.to_json())
    prepare_tracking(run_url, manifest)
    with (
        ray_session(show_logs=arguments.debug),
        sending_to_wandb(run_url, config.tracking, "tune", tell),
    ):
        found = search(config, manifest, store_url, run_url)
    print_search(found)
    print(f"report {storage.join(run_url, REPORT)}")
    print(f"recipe {storage.join(run_url, BEST)}")
    flags = shlex.join(["--store", store_url, "--recipe", storage.join(run_url, BEST)])
    tell(f"next: python -m jobs.train {flags}")


def check_search(config: Config, manifest: Manifest) -> None:
    """Check all settings that trials may get before the first one starts. Raises ConfigError."""
    val = manifest.splits["val"]
    if not 0 < val.positives < val.samples:
        raise ConfigError(
            f"tune.objective: {config.tune.objective} is not defined on val, where {val.positives} "
            f"of {val.samples} studies are positive; prepare a store with both classes in val"
        )
    models = set[ModelConfig]()
    for settings in check_space(config):
        trial = trial_config(config, settings)
        try:
            check_sizes(trial, manifest, num_workers=config.tune.workers_per_trial)
            if trial.model not in models:
                check_weights(trial.model)
        except ConfigError as error:
            raise ConfigError(f"tune.space may draw {settings}, but {error}") from error
        models.add(trial.model)


def begin(config: Config, manifest: Manifest, run_url: str) -> None:
    """Record the search's identity in its folder. Raises RunError where the folder holds a search
    with another space, store or setting."""
    identity: dict[str, Any] = {
        "manifest": manifest.digest,
        **{name: config.model_dump(mode="json")[name] for name in _SAME},
    }
    url = storage.join(run_url, _IDENTITY)
    recorded = storage.find_text(url)
    if recorded is None:
        storage.write_text(url, json.dumps(identity, indent=1) + "\n")
        return
    before, now = flatten(drop_removed(json.loads(recorded))), flatten(identity)
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise RunError(
            f"{run_url}: holds a search with another {', '.join(changed[:3])}; repeat its settings "
            "to resume it, or give another --run"
        )


def search(config: Config, manifest: Manifest, store_url: str, run_url: str) -> Search:
    """Run the trials in the open Ray session; write the results, the recipe last."""
    tune = config.tune
    wait_for_resources(config.cluster, tune.workers_per_trial)
    # Decided once: a node with a GPU that joins later must not change what trials reserve.
    cluster = config.cluster.model_copy(update={"use_gpu": uses_gpu(config.cluster)})
    fixed = config.model_copy(update={"cluster": cluster})
    wait_for_resources(cluster, tune.workers_per_trial)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the table tells of failed trials
    tell(
        f"tune: {tune.trials} trials of {tune.epochs} epochs, {max_concurrent_trials(fixed)} at a "
        f"time on {'GPUs' if cluster.use_gpu else 'CPUs'}; judged by {describe_objective(tune)}"
    )
    shared = load_shared_data(fixed, manifest, store_url)
    runner = _Runner(fixed, manifest, store_url, run_url, shared)
    trials = sort_trials(runner.search(), tune)
    choice = _choose(trials, config, manifest, run_url)
    confirmed: tuple[Trial, ...] = ()
    if tune.confirm:
        confirmed, choice = _confirm(runner, trials, choice)
    found = Search(
        name=storage.last_part(run_url),
        config=config,
        manifest_digest=manifest.digest,
        trials=trials,
        choice=choice,
        confirmed=confirmed,
        importance=measure_importance(trials, tune, config.seed),
    )
    write_results(found, manifest, run_url)
    for trial in (*trials, *confirmed):
        drop_checkpoints(trial_url(run_url, trial.name))
    storage.remove_below(storage.join(run_url, "ray"))
    return found


def _choose(
    trials: Sequence[Trial], config: Config, manifest: Manifest, run_url: str
) -> SettingChoice:
    estimates = {
        trial.name: estimate
        for trial in trials
        if (estimate := read_estimate(trial_url(run_url, trial.name), config.tune)) is not None
    }
    simplicity = partial(measure_simplicity, config, manifest)
    choice = choose_setting(trials, estimates, config.tune, simplicity)
    if choice is None:
        why = next((trial.error for trial in trials if trial.error), "none had all its epochs")
        raise ClusterError(f"tune: every trial failed, the first with: {why}")
    return choice


def _confirm(
    runner: _Runner, trials: Sequence[Trial], choice: SettingChoice
) -> tuple[tuple[Trial, ...], SettingChoice]:
    """Train the best settings with new seeds, and choose again."""
    config = runner.config
    best = settings_to_confirm(trials, config.tune)
    seeds = range(config.seed + 1, config.seed + 1 + config.tune.confirm)
    tell(f"confirm: the best {len(best)} settings with {len(seeds)} new seeds each")
    planned = [
        PlannedTrial(f"{t.name}-seed{seed}", t.settings, seed) for t in best for seed in seeds
    ]
    confirmed = runner.confirm(planned)
    if not any(trial.state == "finished" for trial in confirmed):
        raise ClusterError("tune: no setting could be trained again with another seed")
    worst = chance_level(config.tune, runner.shared.prevalence)
    confirmations = summarise_seeds(best, confirmed, config.tune, worst=worst)
    most = max(len(one.objectives) for one in confirmations)
    for one in confirmations:
        if (count := len(one.objectives)) < most:
            tell(f"warning: confirm: {one.name} has {count} of {most} seeds, and is not chosen")
    simplicity = partial(measure_simplicity, config, runner.manifest)
    return tuple(confirmed), choose_confirmed(choice, trials, confirmations, simplicity)


@dataclass(frozen=True)
class _Runner:
    """Runs the trials of a search with Tune, except those that ended before an interruption."""

    config: Config
    manifest: Manifest
    store_url: str
    run_url: str
    shared: SharedTrialData

    def search(self) -> list[Trial]:
        """Run the trials of the search space."""
        config = self.config.tune
        before = {n: t for n, t in read_trials(self.run_url).items() if "-" not in n}
        ended = [trial for trial in before.values() if not trial.is_open]
        if before:
            tell(
                f"tune: resuming: {len(ended)} trials have ended, "
                f"{len(before) - len(ended)} had not"
            )
        left = config.trials - len(ended)
        if config.algorithm == "grid":
            done = {trial.name for trial in ended}
            planned = [trial for trial in list_grid(self.config) if trial.name not in done]
            searcher = FixedListSearcher(planned, self.run_url)
        else:
            worst = chance_level(config, self.shared.prevalence)
            searcher = OptunaSearcher(self.config, before, self.run_url, worst=worst)
        scheduler = (
            ResumableAsha(config, before) if config.early_stopping == "asha" else FIFOScheduler()
        )
        return [*ended, *self._run("search", searcher, scheduler, left, ended)]

    def confirm(self, planned: Sequence[PlannedTrial]) -> list[Trial]:
        """Run these trials, each for all its epochs."""
        before = read_trials(self.run_url)
        ended = [before[p.name] for p in planned if p.name in before and not before[p.name].is_open]
        done = {trial.name for trial in ended}
        left = [trial for trial in planned if trial.name not in done]
        searcher = FixedListSearcher(left, self.run_url)
        return [*ended, *self._run("confirm", searcher, FIFOScheduler(), len(left), ended)]

    def _run(
        self,
        label: str,
        searcher: FixedListSearcher,
        scheduler: Any,
        left: int,
        ended: Sequence[Trial],
    ) -> list[Trial]:
        config = self.config
        if left <= 0:
            return []
        path, filesystem = open_for_ray(storage.join(self.run_url, "ray"))
        with LiveTable(label, config.tune, left, len(ended)) as table:
            lines = TrialLines(config.tune, partial(write_ended, self.run_url))
            tuner = ray.tune.Tuner(
                make_trainable(config, self.store_url, self.run_url, self.shared),
                tune_config=ray.tune.TuneConfig(
                    num_samples=left,
                    reuse_actors=config.tune.workers_per_trial == 1,
                    search_alg=RoomLimiter(searcher, partial(max_concurrent_trials, config)),
                    scheduler=scheduler,
                ),
                run_config=ray.tune.RunConfig(
                    name=label,
                    storage_path=path,
                    storage_filesystem=filesystem,
                    verbose=0,
                    failure_config=ray.tune.FailureConfig(config.cluster.max_failures),
                    callbacks=[lines, table],
                ),
            )
            results = tuner.fit()
        names = [trial.config["name"] for trial in table.trials]
        if not names and not results.errors:
            return []  # the search was interrupted when it had trained all of a small space
        if not names:
            raise find_cause(results.errors[0]) or ClusterError("tune: no trial could start")
        trials = [read_trial(self.run_url, name) for name in names]
        if lost := [trial.name for trial in trials if trial.state == "unfinished"]:
            raise ClusterError(
                f"tune: Ray Tune ended {', '.join(lost)} without an error; repeat the "
                "command to resume"
            )
        return trials
