"""Whether what a job reads is there, and the place that it writes is free: asked before what takes
seconds to import."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pneumo import storage
from pneumo.command_line import Invocation
from pneumo.config import WEIGHTS_WITHOUT_FILE
from pneumo.errors import ConfigError, RunError, SourceError, StoreError, UserError

Check = tuple[str, type[UserError], str]
"""The object that shows what a place is, the error, and what it says behind the place's URL."""

_INDEX = "checkpoints/index.json"
_KAGGLE = ("", SourceError, "no such folder, or nothing in it; expected Kaggle's layout")
_FILES = ("", SourceError, "no file in it; give the folder of the DICOM files")
_STORE = (
    "manifest.json",
    StoreError,
    "no manifest.json, so nothing is prepared there (or not to its end); run jobs.prepare",
)
_RUN = (_INDEX, RunError, "no checkpoint in it; train first, or give a run that was trained")
_EVALUATED = ("predictions.parquet", RunError, "is not evaluated; evaluate it first")

_READ: Mapping[str, Mapping[str, Check]] = {
    "prepare": {"source": _KAGGLE},
    "train": {"store": _STORE},
    "tune": {"store": _STORE},
    "evaluate": {"store": _STORE, "run": _RUN, "members": _RUN, "compare_with": _EVALUATED},
    "predict": {"source": _FILES, "run": _RUN, "members": _RUN},
}
"""By job and argument, what must be there."""
_TAKEN: Mapping[str, tuple[str, Check]] = {
    "tune": ("run", ("best.toml", RunError, "holds a finished search; give another --run")),
    "evaluate": (
        "run",
        (
            "metrics.json",
            RunError,
            "is evaluated already (a test set is looked at once); --overwrite does it again",
        ),
    ),
    "predict": (
        "output",
        (
            "predictions.csv",
            RunError,
            "holds predictions already; give another --output, or --overwrite",
        ),
    ),
}
"""By job, the argument that it writes, and what must not be there without --overwrite."""


def check_places(invocation: Invocation) -> None:
    """Raise a UserError that names the first place that is missing or taken, or the first setting
    whose file is missing; AccessError and StorageError as `storage` does."""
    job, given = invocation.job, invocation.arguments.model_dump()
    for name, (marker, error, message) in _READ[job].items():
        value = given[name] or []
        for url in [value] if isinstance(value, str) else value:
            if not _holds(url, marker):
                raise error(f"{storage.normalise(url)}: {message}")
    weights, listed = invocation.config.model.weights, invocation.config.split.list
    if weights not in WEIGHTS_WITHOUT_FILE and not _holds(weights, ""):
        raise ConfigError(
            f"model.weights: {weights!r} is no file; give 'imagenet', 'random' or the path of a "
            "state dict"
        )
    if listed is not None and not _holds(listed, ""):
        raise SourceError(f"split.list: {listed!r} is no file")
    if job in _TAKEN and not given.get("overwrite"):
        name, (marker, error, message) = _TAKEN[job]
        if given[name] and _holds(given[name], marker):
            raise error(f"{storage.normalise(given[name])}: {message}")
    if job == "train" and given["run"]:
        _check_is_unfinished(storage.normalise(given["run"]))


def _holds(url: str, marker: str) -> bool:
    url = storage.normalise(url)
    return storage.exists(storage.join(url, marker) if marker else url)


def _check_is_unfinished(run_url: str) -> None:
    try:
        index = json.loads(storage.read_text(storage.join(run_url, _INDEX)))
        epochs = index["entries"][-1]["epoch"] if index["finished"] else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return  # nothing is trained there, or `train` says what is wrong with it
    if epochs is not None:
        raise RunError(f"{run_url}: holds a finished run of {epochs} epochs; give another --run")
