"""The process that sends a run's folder to W&B: `python -m jobs.tracking.sender`, begun by
`jobs.tracking.sending`, which may kill it at any time.

On stdin comes one line of JSON, what to send. With `interval_s` the folder is that of a job that
runs, and is looked at so often until stdin ends. On stdout a line of JSON follows for each thing
that has been sent or could not be.
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
from pneumo.reporting.tracking import TrackedRun, WandbSession

Kind = Literal["train", "evaluate", "external", "tune"]
MAX_PAUSE_S = 300.0
"""After faults of W&B, between two tries."""


def main() -> NoReturn:
    """Send what the first line of stdin asks for; the exit code is 0 when all has arrived."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a Ray job that is cancelled
    order: dict[str, Any] = json.loads(os.read(0, 1 << 20))
    sender = Sender(order["run"], order["kinds"], order["tracking"], Path.cwd())
    pause_s = interval_s = order["interval_s"]
    while pause_s and not _has_ended(pause_s):
        arrived = sender.send(is_last=False)
        pause_s = interval_s if arrived else min(2 * pause_s, MAX_PAUSE_S)
    arrived = sender.send(is_last=True)
    os._exit(0 if arrived else 1)  # wandb would call whatever is still open finished


def _has_ended(timeout_s: float) -> bool:
    """Whether the job ends within this time: its pipe is ready to read once it is closed."""
    return bool(select.select([0], [], [], timeout_s)[0])


class Sender:
    """Sends the runs in a folder, one after the other, each thing once if all goes well."""

    def __init__(
        self, run_url: str, kinds: Sequence[Kind], tracking: dict[str, Any], folder: Path
    ) -> None:
        """`tracking` replaces settings of the runs' own; wandb's files go to `folder`."""
        self.run_url, self.kinds, self.tracking, self.folder = run_url, kinds, tracking, folder
        self._sent: set[str] = set()
        """Ids of what W&B has from beginning to end."""
        self._session: WandbSession | None = None
        """Of a training that goes on."""

    def send(self, *, is_last: bool) -> bool:
        """Send what the folder holds by now; whether it went without a fault.

        A training that goes on stays open unless it `is_last`.
        """
        try:
            runs = list(read_runs(self.run_url, self.kinds, self._sent))
        except Exception as error:  # a fault of the storage: the session is none the worse
            _tell_failure(error)
            return False
        arrived = True
        for run in runs:
            failure = self._try(run, is_open=not (run.is_finished or is_last))
            if failure is not None:
                arrived = False
                if not isinstance(failure, TrackingError):
                    break  # the others would wait for W&B as long
        return arrived

    def _try(self, run: TrackedRun, *, is_open: bool) -> Exception | None:
        """Send the run, or return why not; where a session that was open has broken, it is tried
        once more in a new one."""
        while True:
            session = self._session
            try:
                self._send(run, is_open=is_open)
            except Exception as error:  # whatever wandb throws
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
    """What the folder holds of these kinds, without the runs of these ids.

    What reads a kind takes seconds to import, so that is done only where there is something to
    read. Raises PneumoError where the folder cannot be read.
    """
    found: list[TrackedRun | None] = []
    if "train" in kinds:
        from pneumo.reporting.tracking.training_run import read_training

        found.append(read_training(run_url))
    if "evaluate" in kinds and storage.exists(storage.join(run_url, "metrics.json")):
        from jobs.evaluation.wandb_results import read_evaluation

        found.append(read_evaluation(run_url))
    if "external" in kinds:
        from jobs.evaluation.external_wandb import read_external

        found.append(read_external(run_url))
    yield from (run for run in found if run is not None and run.id not in without)
    if "tune" in kinds and storage.list_urls(storage.join(run_url, "trials")):
        from jobs.tuning.search_wandb import read_search

        yield from read_search(run_url, without)


def _tell(**message: str) -> None:
    print(json.dumps(message), flush=True)


def _tell_failure(error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    _tell(failed=f"{type(error).__name__}: {lines[0][:300]}")


if __name__ == "__main__":
    main()
