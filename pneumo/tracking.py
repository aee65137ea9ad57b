"""`python -m pneumo.tracking sync RUN`: send to W&B what a run could not send."""

import sys

from pneumo.reporting.tracking.command import main

if __name__ == "__main__":
    sys.exit(main())
