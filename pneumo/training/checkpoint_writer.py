"""Writes a run's checkpoints and metrics.jsonl while it trains, in a background thread."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pneumo import storage
from pneumo.errors import CheckpointError, StorageError
from pneumo.training.checkpoints import Checkpoint, check_claim, save_checkpoint

METRICS_LOG = "metrics.jsonl"
_SAVE_INTERVAL_S = 60.0
_MAX_FAILURES = 3

Position = tuple[int, int]
"""Completed epochs, and completed steps of the current one."""


class BackgroundWriter:
    """Writes one checkpoint at a time, in a background thread.

    What is submitted must own its tensors (see `copy_to_cpu`). A StorageError is a warning, and the
    checkpoint before it stays in place; the third in a row, and any other error, is raised by the
    next method call.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._failures = 0
        """Consecutive."""

    def submit(self, write: Callable[[], None]) -> None:
        """Start `write` after the one before it has ended."""
        self._settle()
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raise an error of the writing so far; does not wait."""
        if self._pending is not None and self._pending.done():
            self._settle()

    def flush(self) -> None:
        """Wait until all is written. Raises what the writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being written and end the thread; a failure becomes a warning."""
        self._pool.shutdown(wait=True)
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            self._tell(f"warning: the last checkpoint could not be written: {error}")

    def _settle(self) -> None:
        try:
            self.flush()
        except StorageError as error:
            self._failures += 1
            if self._failures == _MAX_FAILURES:
                raise
            self._tell(f"warning: a checkpoint could not be written, training continues: {error}")
        else:
            self._failures = 0


class RunWriter(BackgroundWriter):
    """Writes the checkpoints of a run; each position once. Only rank 0 uses it."""

    def __init__(
        self,
        run_url: str,
        attempt: str,
        *,
        keep_last: int,
        tell: Callable[[str], None],
        saved_at: Position | None = None,
    ) -> None:
        """`attempt` is the attempt's id, `saved_at` the position of the newest checkpoint."""
        super().__init__(tell)
        self.run_url, self.attempt, self.keep_last = run_url, attempt, keep_last
        self.saved_at = saved_at
        self.saved_s = time.monotonic()

    @property
    def is_save_due(self) -> bool:
        """Whether to save before an epoch's validation, which may take long: where a minute or more
        of training could be lost. Less is not worth another 134 MB."""
        return time.monotonic() - self.saved_s >= _SAVE_INTERVAL_S

    def save(
        self,
        position: Position,
        build: Callable[[], Checkpoint],
        *,
        finished: bool = False,
        stopped_early: bool = False,
        wait: bool = False,
    ) -> None:
        """Start to write the checkpoint that `build` returns; with `wait`, return when it is
        written. Raises errors of this and earlier writes: see `BackgroundWriter`."""
        if position != self.saved_at:
            self.saved_at, self.saved_s = position, time.monotonic()
            self.submit(
                partial(self._write, build(), finished=finished, stopped_early=stopped_early)
            )
        if wait:
            self.flush()

    def _write(self, checkpoint: Checkpoint, *, finished: bool, stopped_early: bool) -> None:
        """Write metrics.jsonl, the checkpoint, then the index.

        Raises RunError, and writes nothing, when another attempt has claimed the run;
        CheckpointError where a local run cannot be written: unlike an object store, a disk does not
        recover by itself.
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
                f"no checkpoint could be written: {error}; repair that, and repeat the command to "
                "resume"
            ) from error


def write_history(run_url: str, history: Sequence[Mapping[str, float | None]]) -> None:
    """Write metrics.jsonl: `Epoch.metrics` of each completed epoch."""
    text = "".join(f"{json.dumps(record, allow_nan=False)}\n" for record in history)
    storage.write_text(storage.join(run_url, METRICS_LOG), text)


def read_history(run_url: str) -> list[dict[str, float | None]]:
    """The metrics of each completed epoch. Raises FileNotFoundError where there is none."""
    lines = storage.read_text(storage.join(run_url, METRICS_LOG)).splitlines()
    return [json.loads(line) for line in lines]
