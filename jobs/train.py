"""Train one model on a prepared store."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "train", "jobs.training.job:train")

if __name__ == "__main__":
    sys.exit(main())
