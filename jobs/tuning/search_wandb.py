"""A search as W&B runs, read from its folder: one for each ended trial, in the search's group, and
one for the whole search once its recipe is written."""

import io
import json
from collections.abc import Collection, Iterator, Mapping

import pyarrow.parquet as pq

from jobs.tuning.trial_records import list_ended, read_trial, trial_config
from pneumo import storage
from pneumo.config import Config, without_folders
from pneumo.reporting.tracking.media import Artifact, Page, Scalar, Table
from pneumo.reporting.tracking.tracked_run import (
    TrackedRun,
    describe_store,
    drop_none,
    make_run_id,
    read_config,
    read_dataset,
)
from pneumo.reporting.tracking.training_run import name_metrics
from pneumo.tuning.trials import Trial, show_setting

BEST, TRIALS, REPORT = "best.toml", "trials.parquet", "report.html"


def read_search(run_url: str, without: Collection[str] = ()) -> Iterator[TrackedRun]:
    """The ended trials and, once it has ended, the search; the ids `without` are left out."""
    config = read_config(run_url)
    if config is None:
        return
    name = make_run_id(run_url)
    for trial in list_ended(run_url):
        if f"{name}-{trial}" not in without:
            yield describe_trial(read_trial(run_url, trial), config, run_url)
    if name not in without and storage.exists(storage.join(run_url, BEST)):
        files = {
            file: storage.read_bytes(storage.join(run_url, file)) for file in (TRIALS, REPORT, BEST)
        }
        yield describe_search(files, config, run_url)


def describe_trial(trial: Trial, config: Config, run_url: str) -> TrackedRun:
    """A trial: its epochs, and how it ended."""
    name = make_run_id(run_url)
    history = [
        {"epoch": number, **name_metrics(dict(record, epoch=None))}
        for number, record in enumerate(trial.history, 1)
    ]
    end: dict[str, Scalar] = {
        "tune/objective": trial.objective(config.tune),
        "tune/epochs": trial.epochs,
        "tune/state": trial.state,
        "tune/error": trial.error,
    }
    store = describe_store(read_dataset(run_url))
    return TrackedRun(
        id=f"{name}-{trial.name}",
        name=f"{name}-{trial.name}",
        group=config.tracking.group or name,
        job_type="tune-trial",
        tracking=config.tracking,
        config={**trial_config(config, trial.settings, trial.seed).without_paths(), **store},
        history=history,
        summary={**(history[-1] if history else {}), **drop_none(end)},
        is_finished=not trial.is_open,
    )


def describe_search(files: Mapping[str, bytes], config: Config, run_url: str) -> TrackedRun:
    """The search as a whole, from its `files`: the table of trials, the page, and the chosen
    setting."""
    name, keys = make_run_id(run_url), list(config.tune.space)
    table = pq.read_table(io.BytesIO(files[TRIALS]))
    choice = json.loads(table.schema.metadata[b"pneumo.choice"])
    trials = [row for row in table.to_pylist() if row["role"] == "search"]
    best = next(row for row in trials if row["chosen"])
    columns = ["name", "state", "objective", "low", "high", "epochs"]
    # Settings as text: W&B requires one type per column.
    rows = [
        [*(row[c] for c in columns), *(show_setting(row[key]) for key in keys)] for row in trials
    ]
    return TrackedRun(
        id=name,
        name=name,
        group=config.tracking.group or name,
        job_type="tune",
        tracking=config.tracking,
        config={**config.without_paths(), **describe_store(read_dataset(run_url))},
        media={
            "tune/trials": Table(["trial", *columns[1:], *keys], rows),
            "tune/report": Page(files[REPORT].decode()),
        },
        summary=drop_none(
            {
                "tune/chosen_objective": best["objective"],
                "tune/trial": best["name"],
                "tune/reason": choice["reason"],
                "tune/epochs": sum(row["epochs"] for row in trials),
                **{f"tune/{key}": without_folders(best[key]) for key in keys},
            }
        ),
        outputs=[Artifact(f"search-{name}", "search", files)],
    )
