"""Train one model on a prepared store."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.terminal.entry_point import run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("train", "jobs.training.job:train", argv)


if __name__ == "__main__":
    sys.exit(main())
