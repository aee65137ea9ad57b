"""Search settings of the training."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.terminal.entry_point import run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("tune", "jobs.tuning.job:tune", argv)


if __name__ == "__main__":
    sys.exit(main())
