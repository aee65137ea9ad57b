"""Send a run to W&B from its folder."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "track", "jobs.tracking.job:track")

if __name__ == "__main__":
    sys.exit(main())
