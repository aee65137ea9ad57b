"""Progress: a bar in a terminal, a plain line every few seconds elsewhere (logs, CI, Ray Jobs)."""

import sys
import time
from typing import Self

from tqdm import tqdm

from jobs.terminal.entry_point import tell


class Progress:
    """Shows the progress of `total` items; use as a context manager."""

    def __init__(
        self, label: str, total: int, unit: str, *, initial: int = 0, interval_s: float = 10.0
    ) -> None:
        """`initial` items were done before and are left out of the rate; plain lines are
        `interval_s` apart."""
        self.label, self.total, self.unit, self.interval_s = label, total, unit, interval_s
        self.done = self.initial = initial
        self.started_s = self.told_s = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                desc=label,
                unit=unit,
                leave=False,
                dynamic_ncols=True,
                initial=initial,
            )

    def advance_to(self, done: int, note: str = "") -> None:
        """Show that `done` items are done; `note` follows the numbers."""
        new, self.done = done - self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(new)
        elif time.monotonic() - self.told_s > self.interval_s and done < self.total:
            self.told_s = time.monotonic()
            rate = (done - self.initial) / (self.told_s - self.started_s)
            left = ""
            if rate > 0:
                left = f", {rate:.3g} a second, about {(self.total - done) / rate:.0f} s left"
            end = f", {note}" if note else ""
            tell(f"{self.label}: {done}/{self.total} {self.unit}{left}{end}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def tell_above_bar(line: str) -> None:
    """Print one line for the user, on stderr; where a bar is shown, above it."""
    tqdm.write(line, file=sys.stderr)
