"""Whether what a job reads is there, and what it writes is free: checked before slow imports."""

import json
from typing import NamedTuple

from pneumo import storage
from pneumo.command_line import Invocation
from pneumo.config import WEIGHTS_WITHOUT_FILE
from pneumo.errors import ConfigError, FinishedError, RunError, SourceError, StoreError, UserError

_INDEX = "checkpoints/index.json"


class _Rule(NamedTuple):
    """What must, or without --overwrite must not, lie at a URL that a job is given."""

    jobs: str
    """Names of jobs; `external` is evaluate with --external."""
    argument: str
    must_be: bool
    name: str
    """Of the object below the URL; none: anything."""
    error: type[UserError]
    message: str


_NO_STORE = "no manifest.json, so nothing is prepared there (or not to its end); run jobs.prepare"
_NO_RUN = "no checkpoint in it; train first, or give a run that was trained"
_NO_FOLDER = "no such folder, or nothing in it; expected a data set, see docs/preparing.md"
_NO_FILE = "no file in it; give a folder of pictures"
_NOT_EVALUATED = "is not evaluated; evaluate it first"
_NOTHING_THERE = "no such folder, or nothing in it; give a run or a search"
_NOT_JUDGED = "is not evaluated on its own store, which freezes the thresholds; do that first"
_SEARCHED = "holds a finished search; give another --run"
_EVALUATED = "is evaluated already (a test set is looked at once); --overwrite does it again"
_PREDICTED = "holds predictions already; give another --output, or --overwrite"
_EXPORTED = "holds an export already; give another --output, or --overwrite"
_RULES = (
    _Rule("prepare", "source", True, "", SourceError, _NO_FOLDER),
    _Rule("predict", "source", True, "", SourceError, _NO_FILE),
    _Rule("train tune evaluate external", "store", True, "manifest.json", StoreError, _NO_STORE),
    _Rule("evaluate predict external export", "run", True, _INDEX, RunError, _NO_RUN),
    _Rule("evaluate predict external export", "members", True, _INDEX, RunError, _NO_RUN),
    _Rule("export", "run", True, "metrics.json", RunError, _NOT_EVALUATED),
    _Rule("external", "external", True, "manifest.json", StoreError, _NO_STORE),
    _Rule("external", "run", True, "metrics.json", RunError, _NOT_JUDGED),
    _Rule("track", "run", True, "", RunError, _NOTHING_THERE),
    _Rule(
        "evaluate external", "compare_with", True, "predictions.parquet", RunError, _NOT_EVALUATED
    ),
    _Rule("tune", "run", False, "best.toml", FinishedError, _SEARCHED),
    _Rule("evaluate", "run", False, "metrics.json", FinishedError, _EVALUATED),
    _Rule("predict", "output", False, "predictions.csv", FinishedError, _PREDICTED),
    _Rule("export", "output", False, "SHA256SUMS", FinishedError, _EXPORTED),
)


def check_places(invocation: Invocation) -> None:
    """Raise a UserError that names the first place that is missing or taken, or the first setting
    whose file is missing; AccessError and StorageError as `storage` does."""
    given = invocation.arguments.model_dump()
    job = "external" if given.get("external") else invocation.job
    for rule in _RULES:
        if job not in rule.jobs.split():
            continue
        if given.get("overwrite") and not rule.must_be:
            continue
        value = given[rule.argument] or []
        if value == "-" and rule.argument == "source":
            continue  # a list of files, on standard input
        for url in [value] if isinstance(value, str) else value:
            if _holds(url, rule.name) != rule.must_be:
                raise rule.error(f"{storage.normalise(url)}: {rule.message}")
    weights, listed = invocation.config.model.weights, invocation.config.split.list
    if weights not in WEIGHTS_WITHOUT_FILE and not _holds(weights):
        raise ConfigError(
            f"model.weights: {weights!r} is no file; give 'imagenet', 'random', a run, or the "
            "path of a state dict"
        )
    if listed is not None and not _holds(listed):
        raise SourceError(f"split.list: {listed!r} is no file")
    if invocation.job == "train" and given["run"]:
        _check_is_unfinished(storage.normalise(given["run"]))


def _holds(url: str, name: str = "") -> bool:
    url = storage.normalise(url)
    return storage.exists(storage.join(url, name) if name else url)


def _check_is_unfinished(run_url: str) -> None:
    try:
        index = json.loads(storage.read_text(storage.join(run_url, _INDEX)))
        epochs = index["entries"][-1]["epoch"] if index["finished"] else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # nothing is trained there, or `train` says what is wrong with it
    if epochs is not None:
        raise FinishedError(
            f"{run_url}: holds a finished run of {epochs} epochs; give another --run"
        )
