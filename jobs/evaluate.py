"""Evaluate a trained run on val and test."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.terminal.entry_point import run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("evaluate", "jobs.evaluation.job:evaluate_run", argv)


if __name__ == "__main__":
    sys.exit(main())
