"""Evaluate a trained run on val and test."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "evaluate", "jobs.evaluation.job:evaluate_run")

if __name__ == "__main__":
    sys.exit(main())
