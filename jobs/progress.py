"""A progress bar in a terminal; a plain line every few seconds elsewhere (logs, CI, Ray Jobs)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from jobs.command import say

_PLAIN_INTERVAL_S = 10.0


class Progress:
    """Counts `total` things; use as a context manager."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.started_s = self.spoken_s = time.monotonic()
        self.bar = (
            tqdm(total=total, desc=label, unit=unit, leave=False, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def advance_to(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are done; `note` stands behind the numbers."""
        step, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(step)
        elif time.monotonic() - self.spoken_s > _PLAIN_INTERVAL_S and done < self.total:
            self.spoken_s = time.monotonic()
            left_s = (self.spoken_s - self.started_s) / max(done, 1) * (self.total - done)
            behind = f", {note}" if note else ""
            rate = done / (self.spoken_s - self.started_s)
            left = f", {rate:.3g} a second, about {left_s:.0f} s left" if done else ""
            say(f"{self.label}: {done}/{self.total} {self.unit}{left}{behind}")

    def write(self, line: str) -> None:
        """A line of text above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            say(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
