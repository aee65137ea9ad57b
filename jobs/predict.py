"""Score a folder of pictures with a trained run."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "predict", "jobs.prediction:predict")

if __name__ == "__main__":
    sys.exit(main())
