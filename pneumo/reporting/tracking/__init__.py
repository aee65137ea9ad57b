"""What a run's folder tells Weights & Biases: values built from files, and a session to send them.

W&B is a sink, never the truth: a run's folder holds all that W&B is told, so that it can be sent
again. Nothing that names a patient is told; keeping it so is the part of whoever writes the folder.
"""

from pneumo.reporting.tracking.media import (
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    Media,
    Overlay,
    Page,
    Picture,
    Scalar,
    Table,
)
from pneumo.reporting.tracking.mode import choose_mode
from pneumo.reporting.tracking.tracked_run import (
    TrackedRun,
    name_group,
    name_run,
    prepare_tracking,
    renew_identity,
)
from pneumo.reporting.tracking.wandb_session import WandbSession

__all__ = [
    "Artifact",
    "ConfusionChart",
    "Gallery",
    "LineChart",
    "Media",
    "Overlay",
    "Page",
    "Picture",
    "Scalar",
    "Table",
    "TrackedRun",
    "WandbSession",
    "choose_mode",
    "name_group",
    "name_run",
    "prepare_tracking",
    "renew_identity",
]
