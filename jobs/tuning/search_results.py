"""What a search leaves: trials.parquet, report.html, W&B's summary run, and best.toml, last."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import tomli_w

from jobs.terminal.entry_point import say
from pneumo import storage
from pneumo.config import without_folders
from pneumo.dataset.manifest import Manifest
from pneumo.reporting.page import render_search
from pneumo.reporting.tracking import Artifact, Page, Table, Tracker, open_tracker
from pneumo.reporting.tracking.closing import close_tracker, tracking_folder
from pneumo.tuning.search import Search, make_recipe, to_parquet
from pneumo.tuning.trials import Trial, describe_settings, show_setting
from pneumo.version import describe_code

BEST = "best.toml"
TRIALS = "trials.parquet"
REPORT = "report.html"
_SHOWN = 20


def print_search(search: Search) -> None:
    """The best trials on stdout, the confirmation, and which setting is taken."""
    config = search.config.tune
    print("trial       objective  95 % interval     epochs  settings")
    for trial in search.trials[:_SHOWN]:
        value, interval = trial.objective(config), trial.interval(config)
        score = "-" if value is None else f"{value:.4f}"
        between = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "-"
        ended = "" if trial.state in ("finished", "stopped") else f"  {trial.state}: {trial.error}"
        stopped = " stopped" if trial.state == "stopped" else ""
        print(
            f"{trial.name:<10}  {score:<9}  {between:<16}  {trial.epochs:<6}  "
            f"{describe_settings(trial.settings)}{stopped}{ended}"
        )
    if len(search.trials) > _SHOWN:
        print(f"and {len(search.trials) - _SHOWN} more in {TRIALS}")
    for one in search.choice.confirmations:
        spread = "" if one.spread is None else f" ± {one.spread:.4f} (standard deviation)"
        seeds = f"{len(one.objectives)} new seed{'s' if len(one.objectives) > 1 else ''}"
        print(f"confirmed {one.name}: mean {one.mean:.4f}{spread} over {seeds}")
    choice = search.choice
    print(f"taken {choice.trial.name}: {choice.reason}")
    if search.warning:
        say(f"warning: {search.warning}")


def write_results(search: Search, manifest: Manifest, run_url: str) -> None:
    """Everything into the run; the recipe last, whose presence says that the search is done."""
    page = render_search(
        search,
        warnings=[text for text in (search.warning, manifest.audit.warning) if text],
        created=time.strftime("%Y-%m-%d %H:%M"),
        code=describe_code(),
    )
    table = to_parquet(search)
    recipe = describe_recipe(search)
    storage.write_bytes(storage.join(run_url, TRIALS), table)
    storage.write_text(storage.join(run_url, REPORT), page)
    _track(search, manifest, run_url, {TRIALS: table, REPORT: page.encode(), BEST: recipe.encode()})
    storage.write_text(storage.join(run_url, BEST), recipe)


def describe_recipe(search: Search) -> str:
    """best.toml: the settings as `--recipe` takes them, and in comments where they come from."""
    choice, config = search.choice, search.config.tune
    value = choice.trial.objective(config)
    objective = choice.trial.interval(config)
    between = f" [{objective[0]:.4f}, {objective[1]:.4f}]" if objective else ""
    lines = [
        f"Found by jobs.tune in {search.name}: trial {choice.trial.name} of {len(search.trials)}, "
        f"{config.objective} {value:.4f}{between} on val.",
        f"Taken as {choice.reason}.",
        *(
            f"Trained again with {len(one.objectives)} new seeds: mean {one.mean:.4f}."
            for one in choice.confirmations
            if one.name == choice.trial.name
        ),
        *([] if search.warning is None else [f"Warning: {search.warning}."]),
        f"Data set {search.manifest_digest[:12]}, code {describe_code()}; trials had "
        f"{config.epochs} epochs.",
    ]
    head = "".join(f"# {line}\n" for line in lines)
    return head + tomli_w.dumps(make_recipe(search.config, choice.trial.settings))


def _track(search: Search, manifest: Manifest, run_url: str, files: Mapping[str, bytes]) -> None:
    """W&B's summary run: the table of trials, the page, the best setting."""
    config = search.config
    tracker = open_tracker(
        config.tracking,
        run_dir=tracking_folder(run_url),
        name=search.name,
        job_type="tune",
        group=config.tracking.group or search.name,
        settings={
            **config.for_others(),
            "dataset_digest": manifest.digest,
            "data_warning": manifest.audit.warning,
        },
    )
    log_search(tracker, search, files)
    close_tracker(tracker, run_url, say)


def log_search(tracker: Tracker, search: Search, files: Mapping[str, bytes]) -> None:
    """The table of trials, the page, the files, and the setting that is taken."""
    best = search.choice.trial
    tracker.log_media("tune/trials", _tabulate(search))
    tracker.log_media("tune/report", Page(files[REPORT].decode()))
    tracker.log_artifact(Artifact(f"search-{search.name}", "search", files))
    tracker.summarise(
        {
            "tune/objective": best.objective(search.config.tune),
            "tune/trial": best.name,
            "tune/reason": search.choice.reason,
            "tune/epochs": search.epochs,
            **{f"tune/{key}": without_folders(value) for key, value in best.settings.items()},
        }
    )


def _tabulate(search: Search) -> Table:
    keys = list(search.config.tune.space)

    def row(trial: Trial) -> list[Any]:
        interval = trial.interval(search.config.tune) or (None, None)
        return [
            trial.name,
            trial.state,
            trial.objective(search.config.tune),
            *interval,
            trial.epochs,
            # One type a column, as W&B wants it.
            *(show_setting(trial.settings[key]) for key in keys),
        ]

    columns = ["trial", "state", "objective", "low", "high", "epochs", *keys]
    return Table(columns, [row(trial) for trial in search.trials])
