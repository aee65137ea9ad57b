"""What lies where a run writes, by the laptop's own credentials: the logs that
`jobs.terminal.log_keeper` keeps there, and the settings with which a run was begun.

The credentials of a laptop may not reach it. Logs are then said to be out of reach; a run is then
judged in the cluster alone.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pneumo import storage
from pneumo.config import Config, changed_sections
from pneumo.errors import PneumoError, RunError

T = TypeVar("T")

LOGS_TIMEOUT_S = 20.0
"""How long the storage may take; a person waits for the log."""
SETTINGS_TIMEOUT_S = 5.0
"""How long it may take before a job is sent without having been compared."""


@dataclass(frozen=True)
class KeptLog:
    """What one attempt said; `name` is when it began."""

    name: str
    text: str


def read_logs(folder_url: str) -> list[KeptLog]:
    """The logs below `folder_url`, oldest first. Raises PneumoError when they cannot be had."""

    def collect() -> list[KeptLog]:
        texts = {
            name: storage.read_bytes(storage.join(folder_url, name)).decode(errors="replace")
            for name in storage.list_names(folder_url)
            if name.endswith(".log")
        }
        return [KeptLog(name.removesuffix(".log"), text) for name, text in texts.items()]

    try:
        return _with_timeout(LOGS_TIMEOUT_S, collect)
    except Exception as error:
        raise PneumoError(f"{folder_url}: {error}") from error


def check_run(config: Config, run_url: str) -> None:
    """Raise RunError where training would refuse to go on with the run at `run_url`: it is
    finished, or was begun with other settings. Says nothing about a place out of reach."""

    def read() -> tuple[dict[str, object], Config]:
        index = storage.read_text(storage.join(run_url, "checkpoints/index.json"))
        before = storage.read_text(storage.join(run_url, "config.json"))
        return json.loads(index), Config.model_validate_json(before)

    try:
        index, before = _with_timeout(SETTINGS_TIMEOUT_S, read)
    except Exception:  # nothing there, no credentials, no network: the job will see
        return
    if index.get("finished"):
        raise RunError(f"{run_url}: holds a finished run; give another --run")
    changed = changed_sections(before, config)
    if index.get("entries") and changed:
        raise RunError(
            f"{run_url}: was begun with other settings in {', '.join(changed)}; repeat them to go "
            "on, or give another --run"
        )


@dataclass(frozen=True)
class Progress:
    """How far a run has come, by the last epoch that its folder tells of; None: not told."""

    epoch: int
    epochs: int
    val_auroc: float | None
    images_per_s: float | None
    data_wait: float | None
    """Share of the time that training waits for data."""
    left_s: float | None
    """If no epoch is left out."""


def read_progress(run_url: str) -> Progress | None:
    """The progress of the training at `run_url`; None where nothing tells of one.

    Raises TimeoutError and PneumoError where the place cannot be read from here.
    """

    def read() -> tuple[Config, list[dict[str, float | None]]]:
        config = Config.model_validate_json(storage.read_text(storage.join(run_url, "config.json")))
        lines = storage.read_text(storage.join(run_url, "metrics.jsonl")).splitlines()
        return config, [json.loads(line) for line in lines]

    try:
        config, epochs = _with_timeout(SETTINGS_TIMEOUT_S, read)
    except (FileNotFoundError, ValueError):
        return None
    if not epochs:
        return None
    last, wanted = epochs[-1], config.train.epochs
    seconds = [s for s in (each.get("epoch_s") for each in epochs[-3:]) if s is not None]
    left_s = (wanted - len(epochs)) * sum(seconds) / len(seconds) if seconds else None
    auroc = last.get("val/ema_auroc", last.get("val/auroc"))
    return Progress(
        len(epochs), wanted, auroc, last.get("images_per_s"), last.get("data_wait"), left_s
    )


def _with_timeout(timeout_s: float, read: Callable[[], T]) -> T:
    """What `read` returns. Storage is tried again for longer than a person waits."""
    found: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            found.append(read())
        except Exception as error:  # raised again where the caller can see it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not found:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return found[0]
