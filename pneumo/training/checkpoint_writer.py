"""How a run is kept while it is trained: its checkpoints and metrics.jsonl, behind the training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial

from pneumo import storage
from pneumo.errors import CheckpointError, StorageError
from pneumo.training.checkpoints import Checkpoint, CheckpointWriter, check_claim, save_checkpoint

METRICS_LOG = "metrics.jsonl"
_WORTH_SAVING_S = 60.0

Place = tuple[int, int]
"""Epochs completed, and steps of the one after them."""


class Keeper:
    """Writes what rank 0 gives it, one checkpoint after the other and each place once."""

    def __init__(
        self,
        run_url: str,
        attempt: str,
        *,
        keep_last: int,
        tell: Callable[[str], None],
        begun_at: Place | None = None,
    ) -> None:
        """`attempt` is the id under which it writes, `begun_at` where the run is kept already."""
        self.run_url, self.attempt, self.keep_last = run_url, attempt, keep_last
        self.kept_at = begun_at
        self.kept_s = time.monotonic()
        self.writer = CheckpointWriter(tell)

    @property
    def is_worth_saving(self) -> bool:
        """Whether training is to be kept before its epoch is validated, which may take long: when
        it would take a minute to repeat. Less is not worth another 134 MB."""
        return time.monotonic() - self.kept_s >= _WORTH_SAVING_S

    def save(
        self,
        place: Place,
        take: Callable[[], Checkpoint],
        *,
        finished: bool = False,
        stopped_early: bool = False,
        wait: bool = False,
    ) -> None:
        """Begin to write the checkpoint that `take` gives; `wait` returns when it is written.

        Raises what writing this one, or one before, has raised: see `CheckpointWriter`.
        """
        if place != self.kept_at:
            self.kept_at, self.kept_s = place, time.monotonic()
            write = partial(self._write, take(), finished=finished, stopped_early=stopped_early)
            self.writer.submit(write)
        if wait:
            self.writer.flush()

    def check(self) -> None:
        """Raise what has gone wrong by now; waits for nothing."""
        self.writer.check()

    def close(self) -> None:
        """End after what is being written."""
        self.writer.close()

    def _write(self, checkpoint: Checkpoint, *, finished: bool, stopped_early: bool) -> None:
        """The epochs' metrics, the checkpoint, the index; nothing when the run is another
        attempt's.

        Raises CheckpointError where a local run cannot be written: a disk does not come back by
        itself.
        """
        lines = (json.dumps(record, allow_nan=False) for record in checkpoint.history)
        text = "".join(f"{line}\n" for line in lines)
        try:
            check_claim(self.run_url, self.attempt)
            storage.write_text(storage.join(self.run_url, METRICS_LOG), text)
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


def read_history(run_url: str) -> list[dict[str, float | None]]:
    """The run's metrics.jsonl: `Epoch.metrics` of each epoch that is complete."""
    lines = storage.read_text(storage.join(run_url, METRICS_LOG)).splitlines()
    return [json.loads(line) for line in lines]
