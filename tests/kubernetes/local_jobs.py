"""Runs jobs on this machine, one after the other on one Ray cluster, as its start takes seconds.

python -m tests.kubernetes.local_jobs '[["prepare", "--source", "…"], …]'
"""

import faulthandler
import importlib
import json
import sys

from jobs.ray_cluster.session import ray_session


def main() -> int:
    """The exit code of the first job that does not end well, or 0."""
    faulthandler.enable()
    with ray_session():
        for job, *flags in json.loads(sys.argv[1]):
            code = importlib.import_module(f"jobs.{job}").main(flags)
            if code:
                return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
