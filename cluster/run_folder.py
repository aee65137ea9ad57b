"""A run's folder, read with the laptop's own credentials: its settings, its progress, and the logs
that `jobs.terminal.log_keeper` writes there.

The laptop may have no access. Reading logs then fails with a message, and only the job on the
cluster checks the run's settings.
"""

import json
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TypeVar

from cluster.targets import JobState, Phase
from pneumo import background, storage
from pneumo.config import Config, changed_sections
from pneumo.errors import PneumoError, RunError

T = TypeVar("T")

LOGS_TIMEOUT_S = 20.0
"""How long reading logs may take, while a user waits."""
SETTINGS_TIMEOUT_S = 5.0
"""How long reading settings may take; after it, a job is submitted without the check."""


@dataclass(frozen=True)
class KeptLog:
    """The log of one attempt; `name` is the time when it began."""

    name: str
    text: str


def read_logs(folder_url: str) -> list[KeptLog]:
    """The logs in `folder_url`, and in its folders, one for each submission; oldest first. Raises
    PneumoError when they cannot be read."""

    def read() -> list[KeptLog]:
        urls = [url for url in _list_files(folder_url) if url.endswith(".log")]
        texts = {url: storage.read_bytes(url).decode(errors="replace") for url in urls}
        return [KeptLog(_stem(url), text) for url, text in texts.items()]

    try:
        return _with_timeout(LOGS_TIMEOUT_S, read)
    except Exception as error:
        raise PneumoError(f"{folder_url}: {error}") from error


def read_exit_code(folder_url: str) -> int | None:
    """The exit code of the last attempt of which `folder_url` keeps a log, as `read_logs`; None
    where it has not ended, or cannot be read."""

    def read() -> int | None:
        urls = _list_files(folder_url)
        last = max((_stem(url) for url in urls), default="")
        codes = [url for url in urls if url.endswith(".exit") and _stem(url) == last]
        return int(storage.read_text(codes[0])) if codes else None

    try:
        return _with_timeout(LOGS_TIMEOUT_S, read)
    except Exception:  # no credentials, no network: the outcome is not known here
        return None


def judge_deleted(job_id: str, folder_url: str, *, was_away: bool) -> JobState:
    """The state of a job that its cluster does not know any more, by what its log keeper left in
    `folder_url`, "" where it keeps none. `was_away`: the cluster was out of reach since the job was
    last seen, which may have ended, and been removed, meanwhile."""
    code = read_exit_code(folder_url) if folder_url else None
    if code == 0:
        return JobState(job_id, "succeeded")
    if not was_away:
        return JobState(job_id, "cancelled", why="someone deleted it")
    if code is None:
        why = f"it is gone from the cluster; whether it finished is not known, see {folder_url}"
        return JobState(job_id, "failed", why=why)
    phase: Phase = "cancelled" if code == 130 else "failed"
    return JobState(job_id, phase, why=f"exit code {code}", driver_exit_code=code)


def _list_files(folder_url: str) -> list[str]:
    """URLs of the files in a folder and in its folders, by name."""
    urls = [storage.join(folder_url, name) for name in storage.list_names(folder_url)]
    folders = [url for url in urls if not url.endswith((".log", ".exit"))]
    below = [storage.join(url, name) for url in folders for name in storage.list_names(url)]
    return sorted([*(url for url in urls if url not in folders), *below], key=_stem)


def _stem(url: str) -> str:
    return storage.last_part(url).rsplit(".", 1)[0]


def check_run(config: Config, run_url: str) -> None:
    """Raise RunError where training would refuse to resume the run at `run_url`: it is finished, or
    was begun with other settings. Does nothing where the folder cannot be read."""

    def read() -> tuple[dict[str, object], Config]:
        index = storage.read_text(storage.join(run_url, "checkpoints/index.json"))
        before = storage.read_text(storage.join(run_url, "config.json"))
        return json.loads(index), Config.model_validate_json(before)

    try:
        index, before = _with_timeout(SETTINGS_TIMEOUT_S, read)
    except Exception:  # no such run, no credentials, no network: the job itself will check
        return
    if index.get("finished"):
        raise RunError(f"{run_url}: holds a finished run; give another --run")
    changed = changed_sections(before, config)
    if index.get("entries") and changed:
        raise RunError(
            f"{run_url}: was started with other settings in {', '.join(changed)}; repeat them to "
            "go on, or give another --run"
        )


@dataclass(frozen=True)
class Progress:
    """Progress of a run after the last epoch in its folder; None: not recorded."""

    epoch: int
    epochs: int
    val_auroc: float | None
    images_per_s: float | None
    data_wait: float | None
    """Fraction of the time that training waits for data."""
    left_s: float | None
    """Estimated time left, without early stopping."""


def read_progress(run_url: str) -> Progress | None:
    """The progress of the training at `run_url`; None where none is recorded.

    Raises TimeoutError and PneumoError where the folder cannot be read from here.
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
    """What `read` returns, or TimeoutError: storage retries for longer than a user would wait."""
    answer = background.start(read)
    if not wait([answer], timeout_s).done:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return answer.result()
