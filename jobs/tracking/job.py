"""Send a run to W&B from its folder: the training, its evaluations, or a search with its trials.

As often as one likes: what W&B has of a run is not doubled. Project, entity and group are those of
the run unless `--tracking.…` says otherwise.
"""

import os

from jobs.tracking.sending import SenderProcess
from pneumo import storage
from pneumo.command_line import Invocation, TrackArguments
from pneumo.errors import ConfigError, TrackingError
from pneumo.reporting.tracking import choose_mode, renew_identity

IDLE_TIMEOUT_S = 180.0
"""Nobody's job waits, so uploads over a slow line may take their time."""


def track(invocation: Invocation) -> None:
    """Send the folder of `--run`. Raises ConfigError where W&B may not or cannot be reached,
    TrackingError where not all has arrived."""
    arguments, tracking = invocation.arguments, invocation.config.tracking
    assert isinstance(arguments, TrackArguments)
    run_url = storage.normalise(arguments.run)
    if choose_mode(tracking, os.environ) != "online":
        raise ConfigError(
            "W&B: no key (WANDB_API_KEY, or `wandb login`), or WANDB_MODE or tracking.mode keeps "
            "from sending"
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
        raise TrackingError(f"W&B: not all sent: {outcome.failure}; the same command sends it")
    if not outcome.urls:
        raise TrackingError(f"{run_url}: no training, evaluation or search to send")
