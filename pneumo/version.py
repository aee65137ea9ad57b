"""Which code this is, for the checkpoints that it writes."""

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pneumo import __version__

REVISION = "PNEUMO_REVISION"
"""The environment variable that holds the git revision where there is no checkout: in the image,
and in code that was sent to a cluster."""


@cache
def describe_code() -> str:
    """Package version and git revision, '1.0+ab12cd3'; the revision as far as it is known."""
    return describe(Path(__file__).parent, os.environ)


def describe(folder: Path, environ: Mapping[str, str]) -> str:
    """The same for the code in `folder`; the environment wins, as the folder may be a copy."""
    revision = environ.get(REVISION) or find_revision(folder)
    return f"{__version__}+{revision}" if revision else __version__


def find_revision(folder: Path) -> str:
    """What git calls the commit that is checked out in `folder`; '' where it is no checkout, or one
    of another project, in whose virtual environment pneumo is installed."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return ""
