"""Prepare a store from a data set's folder."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "prepare", "jobs.preparation:prepare")

if __name__ == "__main__":
    sys.exit(main())
