"""Check, before slow imports, that what a job reads exists and what it writes does not."""

import json
import os
from typing import NamedTuple

from pneumo import storage
from pneumo.command_line import Invocation
from pneumo.config import WEIGHTS_WITHOUT_FILE
from pneumo.errors import ConfigError, FinishedError, RunError, SourceError, StoreError, UserError

_INDEX = "checkpoints/index.json"


class _Rule(NamedTuple):
    """An object that must, or without --overwrite must not, exist at a URL of the command line."""

    jobs: str
    """Names of jobs, separated by spaces; `external` is evaluate with --external."""
    argument: str
    must_exist: bool
    name: str
    """Name of the object below the URL; "": any object."""
    error: type[UserError]
    message: str


_NO_STORE = "no manifest.json, so nothing is prepared there (or not completely); run jobs.prepare"
_NO_RUN = "no checkpoint in it; train first, or give a run that was trained"
_NO_FOLDER = "no such folder, or nothing in it; expected a data set, see docs/preparing.md"
_NO_FILE = "no file in it; give a folder of pictures"
_NOT_EVALUATED = "is not evaluated; evaluate it first"
_NOTHING_THERE = "no such folder, or nothing in it; give a run or a search"
_NO_THRESHOLDS = "is not evaluated on its own store, which freezes the thresholds; do that first"
_SEARCHED = "holds a finished search; give another --run"
_EXTERNALLY = (
    "is evaluated on other sets already, whose results would be replaced; to do it again, name all "
    "sets and --overwrite"
)
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
    _Rule("external", "run", True, "metrics.json", RunError, _NO_THRESHOLDS),
    _Rule("track", "run", True, "", RunError, _NOTHING_THERE),
    _Rule(
        "evaluate external", "compare_with", True, "predictions.parquet", RunError, _NOT_EVALUATED
    ),
    _Rule("tune", "run", False, "best.toml", FinishedError, _SEARCHED),
    _Rule("evaluate", "run", False, "metrics.json", FinishedError, _EVALUATED),
    _Rule("external", "run", False, "external/metrics.json", FinishedError, _EXTERNALLY),
    _Rule("predict", "output", False, "summary.json", FinishedError, _PREDICTED),
    _Rule("export", "output", False, "SHA256SUMS", FinishedError, _EXPORTED),
)
_OUTPUTS = {
    "prepare": ("store", "store"),
    "train": ("run", "run"),
    "tune": ("run", "search"),
    "evaluate": ("run", "run"),
    "predict": ("output", "predictions"),
    "export": ("output", "export"),
}
"""For each job, the argument that names where it writes, and what it writes there."""
UNFINISHED = "unfinished.txt"
"""Stands in an --output from the first write to the last, so that a killed job can be repeated."""
WRITTEN = {
    "predict": ("summary.json", "predictions.csv", "predictions.parquet", "overlays"),
    "export": (
        *("SHA256SUMS", "model.onnx", "model.pt2", "preprocessing.json", "preprocessing.py"),
        *("score.py", "requirements.txt", "README.md", "model_card.md"),
    ),
}
"""What these jobs write below --output; the first is written last."""
_MARKERS = {"store": "manifest.json", "run": _INDEX, "search": "search.json"}
"""The object that shows what a folder holds. In one folder they would overwrite each other."""


def check_places(invocation: Invocation) -> None:
    """Raise a UserError for the first missing input, existing output, or setting with a missing
    file; AccessError and StorageError as `storage` does."""
    given = invocation.arguments.model_dump()
    job = "external" if given.get("external") else invocation.job
    for rule in _RULES:
        if job not in rule.jobs.split():
            continue
        if given.get("overwrite") and not rule.must_exist:
            continue
        value = given[rule.argument] or []
        if value == "-" and rule.argument == "source":
            continue  # a list of files, on standard input
        for url in [value] if isinstance(value, str) else value:
            if _exists(url, rule.name) != rule.must_exist:
                raise rule.error(f"{storage.normalise(url)}: {rule.message}")
    weights, split_list = invocation.config.model.weights, invocation.config.split.list
    if weights not in WEIGHTS_WITHOUT_FILE and not _exists(weights):
        raise ConfigError(
            f"model.weights: {weights!r} is no file; give 'imagenet', 'random', a run, or the "
            "path of a state dict"
        )
    if split_list is not None and not _exists(split_list):
        raise SourceError(f"split.list: {split_list!r} is no file")
    if invocation.job == "train" and given["run"]:
        _check_is_unfinished(storage.normalise(given["run"]))
    argument, content = _OUTPUTS.get(invocation.job, ("", ""))
    if given.get(argument):
        _check_output(f"--{argument}", storage.normalise(given[argument]), content)
    if invocation.job in WRITTEN:
        _check_nothing_foreign(storage.normalise(given["output"]), *WRITTEN[invocation.job])


def _exists(url: str, name: str = "") -> bool:
    url = storage.normalise(url)
    return storage.exists(storage.join(url, name) if name else url)


def _check_nothing_foreign(url: str, last: str, *names: str) -> None:
    """Raise RunError where the job would replace what no earlier job has written."""
    if _exists(url, last) or _exists(url, UNFINISHED):
        return
    for name in names:
        if _exists(url, name):
            raise RunError(
                f"--output {url}: {name} in it is not of an earlier job, and would be replaced; "
                "give another folder"
            )


def _check_output(flag: str, url: str, content: str) -> None:
    for held, marker in _MARKERS.items():
        if held != content and _exists(url, marker):
            raise RunError(f"{flag} {url}: is a {held}; give another folder for the {content}")
    if storage.is_local(url):
        check_writable_folder(url)


def check_writable_folder(url: str) -> None:
    """Raise ConfigError unless the local folder `url` can be made, or can be written to."""
    path = storage.local_path(url)
    existing = next(each for each in (path, *path.parents) if os.access(each, os.F_OK))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{url}: {existing} cannot be written to, or is no folder")


def _check_is_unfinished(run_url: str) -> None:
    try:
        index = json.loads(storage.read_text(storage.join(run_url, _INDEX)))
        epochs = index["entries"][-1]["epoch"] if index["finished"] else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # nothing is trained there yet, or `train` will report what is wrong
    if epochs is not None:
        raise FinishedError(
            f"{run_url}: holds a finished run of {epochs} epochs; give another --run"
        )
