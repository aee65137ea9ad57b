"""Search for the best training settings."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "tune", "jobs.tuning.job:tune")

if __name__ == "__main__":
    sys.exit(main())
