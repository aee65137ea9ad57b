"""Send to W&B what a run could not send: `python -m pneumo.tracking sync RUN`.

RUN is a run's folder or URL. Unlike `wandb sync` it finds the files of a run that was moved or lies
in a bucket, and exits 1 where something did not arrive.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pneumo import storage
from pneumo.errors import PneumoError
from pneumo.reporting.tracking.backlog import send_backlog


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pneumo.tracking", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    sync = ways.add_parser("sync", help="send what could not be sent")
    sync.add_argument("run", help="the run's folder or URL")
    run_url = storage.normalise(parser.parse_args(argv).run)
    try:
        with tempfile.TemporaryDirectory(prefix="pneumo-tracking-") as folder:
            number = send_backlog(run_url, Path(folder))
    except PneumoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{number} sent" if number else f"{run_url}: nothing to send")
    return 0
