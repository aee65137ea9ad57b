"""`python -m pneumo.dashboards`: W&B workspaces as JSON, or saved."""

import sys

from pneumo.reporting.tracking.dashboards import main

if __name__ == "__main__":
    sys.exit(main())
