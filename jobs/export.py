"""Export an evaluated run to a folder that scores DICOM files without pneumo."""

import sys
from functools import partial

from jobs.terminal.entry_point import run_job

main = partial(run_job, "export", "jobs.exporting:export")

if __name__ == "__main__":
    sys.exit(main())
