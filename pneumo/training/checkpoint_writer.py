"""How a run is written while it is trained: checkpoints and metrics.jsonl, in a thread."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pneumo import storage
from pneumo.errors import CheckpointError, StorageError
from pneumo.training.checkpoints import Checkpoint, check_claim, save_checkpoint

METRICS_LOG = "metrics.jsonl"
_WORTH_SAVING_S = 60.0
_MOST_FAILURES = 3

Position = tuple[int, int]
"""Epochs completed, and steps of the one after them."""


class BackgroundWriter:
    """Writes in a thread of its own while training goes on, one checkpoint at a time.

    What is submitted must own its tensors (see `copy_to_cpu`). Where an object store does not
    answer, a line says so and training goes on, with the checkpoint before; the third failure in a
    row, and any other one, is raised by the method that is called next.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        """In a row."""

    def submit(self, write: Callable[[], None]) -> None:
        """Start `write` once the one before it has ended."""
        self._settle()
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raise what has gone wrong by now; waits for nothing."""
        if self._pending is not None and self._pending.done():
            self._settle()

    def flush(self) -> None:
        """Return when all is written. Raises what the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """End the thread after what it is writing; a failure becomes a warning."""
        self._pool.shutdown(wait=True)
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            self._tell(f"warning: the last checkpoint could not be written: {error}")

    def _settle(self) -> None:
        try:
            self.flush()
        except StorageError as error:
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                raise
            self._tell(f"warning: a checkpoint could not be written, training goes on: {error}")
        else:
            self._failures = 0


class RunWriter(BackgroundWriter):
    """Writes what rank 0 gives it, each position of the run once."""

    def __init__(
        self,
        run_url: str,
        attempt: str,
        *,
        keep_last: int,
        tell: Callable[[str], None],
        begun_at: Position | None = None,
    ) -> None:
        """`attempt` is the id under which it writes, `begun_at` what is saved already."""
        super().__init__(tell)
        self.run_url, self.attempt, self.keep_last = run_url, attempt, keep_last
        self.saved_at = begun_at
        self.saved_s = time.monotonic()

    @property
    def is_worth_saving(self) -> bool:
        """Whether training is to be saved before its epoch is validated, which may take long: when
        it would take a minute to repeat. Less is not worth another 134 MB."""
        return time.monotonic() - self.saved_s >= _WORTH_SAVING_S

    def save(
        self,
        position: Position,
        take: Callable[[], Checkpoint],
        *,
        finished: bool = False,
        stopped_early: bool = False,
        wait: bool = False,
    ) -> None:
        """Begin to write the checkpoint that `take` gives; `wait` returns when it is written.

        Raises what writing this one, or one before, has raised: see `BackgroundWriter`.
        """
        if position != self.saved_at:
            self.saved_at, self.saved_s = position, time.monotonic()
            self.submit(
                partial(self._write, take(), finished=finished, stopped_early=stopped_early)
            )
        if wait:
            self.flush()

    def _write(self, checkpoint: Checkpoint, *, finished: bool, stopped_early: bool) -> None:
        """The epochs' metrics, the checkpoint, the index; nothing when the run is another
        attempt's.

        Raises CheckpointError where a local run cannot be written: a disk does not come back by
        itself.
        """
        try:
            check_claim(self.run_url, self.attempt)
            write_history(self.run_url, checkpoint.history)
            save_checkpoint(
                self.run_url,
                checkpoint,
                attempt=self.attempt,
                keep_last=self.keep_last,
                finished=finished,
                stopped_early=stopped_early,
            )
        except StorageError as error:
            if not storage.is_local(self.run_url):
                raise
            raise CheckpointError(
                f"no checkpoint could be written: {error}; the same command goes on when that is "
                "mended"
            ) from error


def write_history(run_url: str, history: Sequence[Mapping[str, float | None]]) -> None:
    """The run's metrics.jsonl: `Epoch.metrics` of each epoch that is complete."""
    text = "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in history)
    storage.write_text(storage.join(run_url, METRICS_LOG), text)


def read_history(run_url: str) -> list[dict[str, float | None]]:
    """What `write_history` wrote. Raises FileNotFoundError where no epoch is complete."""
    lines = storage.read_text(storage.join(run_url, METRICS_LOG)).splitlines()
    return [json.loads(line) for line in lines]
