"""What every worker process of a job does first."""

from __future__ import annotations

import os

import ray


def know_cluster() -> None:
    """Name this worker's own cluster to all that looks for one.

    Ray's State API looks at the machine instead, and gives up where it finds two clusters. Train's
    cleaner asks it whether a run has ended: without an answer it never gives back the resources of
    a trial that was stopped, and the next trial waits for ever.
    """
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
