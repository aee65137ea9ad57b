"""Tracker: what a run logs. Weights & Biases behind it, a memory one for tests, none at all.

W&B is a sink, never the truth: that is metrics.json, predictions.parquet and report.html. So no
fault of W&B's (no key, a wrong one, no network, a server that hangs or refuses uploads) fails or
hangs a job: all of it is kept in an offline run, one line says so, and another how to send it.
Everything that W&B writes stays inside the run's folder. Nothing that names a patient is logged;
keeping it so is the caller's part.
"""

from pneumo.reporting.tracking.media import (
    MAX_IMAGES,
    MAX_ROWS,
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    Media,
    Overlay,
    Page,
    Picture,
    PictureTable,
    Scalar,
    Table,
)
from pneumo.reporting.tracking.mode import choose_mode
from pneumo.reporting.tracking.tracker import (
    MemoryTracker,
    NullTracker,
    Role,
    Tracker,
    TrackingOutcome,
)
from pneumo.reporting.tracking.wandb_run import WandbTracker, open_tracker

__all__ = [
    "MAX_IMAGES",
    "MAX_ROWS",
    "Artifact",
    "ConfusionChart",
    "Gallery",
    "LineChart",
    "Media",
    "MemoryTracker",
    "NullTracker",
    "Overlay",
    "Page",
    "Picture",
    "PictureTable",
    "Role",
    "Scalar",
    "Table",
    "Tracker",
    "TrackingOutcome",
    "WandbTracker",
    "choose_mode",
    "open_tracker",
]
