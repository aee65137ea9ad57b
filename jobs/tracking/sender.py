"""The process that sends a run's folder to W&B: `python -m jobs.tracking.sender`, started by
`jobs.tracking.sending`, which may kill it at any time.

Reads one line of JSON from stdin: the request. With `interval_s`, a job is still writing the
folder, and the process reads it at this interval until stdin is closed. Writes a line of JSON to
stdout for each item that was sent or failed.
"""

import json
import os
import select
import signal
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pneumo import storage
from pneumo.config import TrackingConfig
from pneumo.errors import TrackingError
from pneumo.reporting.tracking.tracked_run import TrackedRun
from pneumo.reporting.tracking.wandb_session import WandbSession

Kind = Literal["train", "evaluate", "external", "tune"]
MAX_PAUSE_S = 300.0
"""Between retries after errors of W&B."""


def main() -> NoReturn:
    """Serve the request on stdin; the exit code is 0 when everything has arrived."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent when a Ray job is cancelled
    request: dict[str, Any] = json.loads(os.read(0, 1 << 20))
    sender = Sender(request["run"], request["kinds"], request["tracking"], Path.cwd())
    pause_s = interval_s = request["interval_s"]
    while pause_s and not _has_ended(pause_s):
        arrived = sender.send(is_last=False)
        pause_s = interval_s if arrived else min(2 * pause_s, MAX_PAUSE_S)
    arrived = sender.send(is_last=True)
    os._exit(0 if arrived else 1)  # on a normal exit wandb would mark open runs as finished


def _has_ended(timeout_s: float) -> bool:
    """Whether the job closes stdin within this time: a closed pipe is ready to read."""
    return bool(select.select([0], [], [], timeout_s)[0])


class Sender:
    """Sends the runs in a folder one after the other, without repeating what has arrived."""

    def __init__(
        self, run_url: str, kinds: Sequence[Kind], tracking: dict[str, Any], folder: Path
    ) -> None:
        """`tracking` replaces the runs' own settings; wandb writes its files to `folder`."""
        self.run_url, self.kinds, self.tracking, self.folder = run_url, kinds, tracking, folder
        self._sent: set[str] = set()
        """Ids of the W&B runs that are complete."""
        self._session: WandbSession | None = None
        """Open session of a training that is not finished."""

    def send(self, *, is_last: bool) -> bool:
        """Send what is new in the folder; whether that succeeded.

        The W&B run of an unfinished training stays open unless `is_last`.
        """
        arrived = True
        try:
            for run in read_runs(self.run_url, self.kinds, self._sent):
                is_open = run.job_type == "train" and not (run.is_finished or is_last)
                failure = self._try(run, is_open=is_open)
                if failure is not None:
                    arrived = False
                    if not isinstance(failure, TrackingError):
                        break  # the other runs would wait as long for W&B
        except Exception as error:  # a folder that cannot be read does not affect the W&B session
            _tell_failure(error)
            return False
        return arrived

    def _try(self, run: TrackedRun, *, is_open: bool) -> Exception | None:
        """Send the run, or return the error. If a session that was open before fails, try once more
        in a new one."""
        while True:
            session = self._session
            try:
                self._send(run, is_open=is_open)
            except Exception as error:  # wandb raises many kinds
                _tell_failure(error)
                if self._session is not None:
                    self._session.abandon()
                    self._session = None
                if session is None:
                    return error
            else:
                return None

    def _send(self, run: TrackedRun, *, is_open: bool) -> None:
        settings = TrackingConfig.model_validate(run.tracking.model_dump() | self.tracking)
        run = replace(run, tracking=settings, group=self.tracking.get("group") or run.group)
        session = self._session = self._session or WandbSession(run, self.folder)
        if is_open:
            session.send_numbers(run)
            return
        session.close(run, lambda step: _tell(step=step))
        self._session = None
        self._sent.add(run.id)
        _tell(url=session.url, job_type=run.job_type)


def read_runs(
    run_url: str, kinds: Collection[Kind], without: Collection[str]
) -> Iterator[TrackedRun]:
    """The runs of these kinds in the folder, except those with the ids `without`; each is read when
    its turn comes. Raises PneumoError where it cannot be read."""
    found = _read_jobs(run_url, kinds)
    yield from (run for run in found if run is not None and run.id not in without)
    if "tune" in kinds and storage.list_urls(storage.join(run_url, "trials")):
        from jobs.tuning.search_wandb import read_search

        yield from read_search(run_url, without)


def _read_jobs(run_url: str, kinds: Collection[Kind]) -> Iterator[TrackedRun | None]:
    """The module that reads a kind takes seconds to import, so it is imported only where there is
    something to read."""
    if "train" in kinds:
        from pneumo.reporting.tracking.training_run import read_training

        yield read_training(run_url)
    if "evaluate" in kinds and storage.exists(storage.join(run_url, "metrics.json")):
        from jobs.evaluation.wandb_results import read_evaluation

        yield read_evaluation(run_url)
    if "external" in kinds:
        from jobs.evaluation.external_wandb import read_external

        yield read_external(run_url)


def _tell(**message: str) -> None:
    print(json.dumps(message), flush=True)


def _tell_failure(error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    _tell(failed=f"{type(error).__name__}: {lines[0][:300]}")


if __name__ == "__main__":
    main()
