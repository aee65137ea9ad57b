"""Submissions of a real training, and the epochs that its log tells of."""

import re
from datetime import datetime

from cluster.submission import Submission, plan
from tests.kubernetes.cluster import Team
from tests.kubernetes.watching import Watched

LONG_S = 600


def make_training(team: Team, store: str, name: str, epochs: int, *flags: str) -> Submission:
    """Two workers, of which one may be missing, and a checkpoint after each epoch."""
    argv = [
        *("--store", store, "--run", f"{team.bucket}/{name}", "--recipe", "fast"),
        *("--data.image-size", "64", "--train.epochs", str(epochs), "--train.batch-size", "32"),
        *("--cluster.num-workers", "2", "--cluster.cpus-per-worker", "1", *flags),
    ]
    return plan("train", argv, team.environ, remote=True, now=datetime.now())


def epochs_of(run: Watched) -> list[int]:
    """Of the lines of finished epochs so far."""
    return [int(n) for n in re.findall(r"^epoch +(\d+)/", "".join(run.text), re.MULTILINE)]


def wait_for_epoch(run: Watched, after: int) -> None:
    """Return once an epoch later than `after` is finished."""
    run.team.wait(f"an epoch after {after}", lambda: max(epochs_of(run), default=0) > after, LONG_S)
