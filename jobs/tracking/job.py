"""Send a run to W&B from its folder: the training, its evaluations, or a search with its trials.

May be repeated: W&B gets nothing twice. Project, entity and group are those of the run unless
`--tracking.…` replaces them.
"""

import os

from jobs.tracking.sending import SenderProcess
from pneumo import storage
from pneumo.command_line import Invocation, TrackArguments
from pneumo.errors import ConfigError, TrackingError
from pneumo.reporting.tracking.mode import choose_mode
from pneumo.reporting.tracking.tracked_run import renew_identity

IDLE_TIMEOUT_S = 180.0
"""Longer than in a job, as no job waits for slow uploads here."""


def track(invocation: Invocation) -> None:
    """Send the folder of `--run`. Raises ConfigError where W&B is switched off or has no key,
    TrackingError where not everything has arrived."""
    arguments, tracking = invocation.arguments, invocation.config.tracking
    assert isinstance(arguments, TrackArguments)
    run_url = storage.normalise(arguments.run)
    if choose_mode(tracking, os.environ) != "online":
        raise ConfigError(
            "W&B: no key (WANDB_API_KEY, or `wandb login`), or WANDB_MODE or tracking.mode "
            "switches sending off"
        )
    if arguments.anew:
        renew_identity(run_url)
    given = tracking.model_dump(include=tracking.model_fields_set - {"mode"})
    outcome = SenderProcess(run_url, ["train", "evaluate", "external", "tune"], given).close(
        IDLE_TIMEOUT_S
    )
    for job_type, url in outcome.urls.items():
        print(f"{job_type} {url}")
    if outcome.failure is not None:
        raise TrackingError(
            f"W&B: not all sent: {outcome.failure}; repeat the command to send the rest"
        )
    if not outcome.urls:
        raise TrackingError(f"{run_url}: no training, evaluation or search to send")
