"""One W&B run, written through wandb: created or resumed, and closed when all has arrived.

Every call may wait for a server that does not answer; it runs in a process that can be killed
(`jobs.tracking`).
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pneumo.errors import TrackingError
from pneumo.reporting.tracking.media import Scalar
from pneumo.reporting.tracking.tracked_run import TrackedRun
from pneumo.reporting.tracking.wandb_media import to_wandb_artifact, to_wandb_media

START_TIMEOUT_S = 20.0
_LISTING_TIMEOUT_S = 10
_LISTING_TRIES = 5
"""W&B may list an uploaded file a little later."""
_DELETED = "previously created and deleted"
"""How the server refuses the id of a deleted run."""


class WandbSession:
    """A W&B run that is being written.

    A run can be sent again without duplicates: its id is fixed, W&B ignores steps that it has, and
    files and artifacts are identified by their content. Raises whatever wandb raises.
    """

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        """Create or resume the run; wandb's own files go below `folder`.

        Raises TrackingError where the run was deleted at W&B.
        """
        import wandb

        self.folder = folder
        try:
            self._run = wandb.init(
                project=run.tracking.project,
                entity=run.tracking.entity,
                id=run.id,
                resume="allow",
                group=run.group,
                name=run.name,
                job_type=run.job_type,
                config=run.full_config,
                mode="online",
                reinit="create_new",
                settings=_settings(folder),
            )
        except wandb.errors.Error as error:
            if _DELETED in str(error):
                raise TrackingError(
                    f"the run {run.id} was deleted at W&B, which takes no id twice; restore it "
                    "there, or give the command --anew to send it under another id"
                ) from error
            raise
        for prefix in ("train", "val", "perf"):
            # No automatic summary: the scored epoch is often not the last.
            self._run.define_metric(f"{prefix}/*", step_metric="epoch", summary="none")
        self._next_step = self._run.starting_step
        self._summary: Mapping[str, Scalar] = {}

    @property
    def url(self) -> str:
        """The run's page."""
        return str(self._run.url)

    def send_numbers(self, run: TrackedRun) -> None:
        """Send new epochs and the summary; does not wait for uploads."""
        for row in run.history:
            step = int(row["epoch"])
            if step >= self._next_step:
                self._run.log(dict(row), step=step)
                self._next_step = step + 1
        if run.summary != self._summary:
            self._summary = run.summary
            self._run.summary.update(dict(run.summary))

    def close(self, run: TrackedRun, tell: Callable[[str], None]) -> None:
        """Send all of the run, finish it, and check that its files have arrived.

        `tell` is called with each step. Raises TrackingError where files did not arrive.
        """
        self.send_numbers(run)
        if run.media:
            # In one step, so that W&B has all of it or none.
            self._run.log({key: to_wandb_media(media) for key, media in run.media.items()}, step=0)
            tell("media")
        for artifact in run.inputs:
            self._run.use_artifact(to_wandb_artifact(artifact))
            tell(artifact.name)
        for artifact in run.outputs:
            self._run.log_artifact(
                to_wandb_artifact(artifact), aliases=list(artifact.aliases)
            ).wait()
            tell(artifact.name)
        path, files = self._run.path, Path(self._run.dir)
        self._run.finish(exit_code=0 if run.is_finished else 1)
        tell("end")
        _check_arrived(path, files / "media", files)

    def abandon(self) -> None:
        """Close after a fault, ignoring further errors, so that a new session can be created."""
        import wandb

        with contextlib.suppress(Exception):
            self._run.finish(exit_code=1)
        with contextlib.suppress(Exception):
            wandb.teardown()


def _check_arrived(path: str, folder: Path, root: Path) -> None:
    """Compare the files below `folder` with W&B's list, as wandb does not report failed uploads."""
    import wandb

    sizes = {str(f.relative_to(root)): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    missing = set(sizes)
    for attempt in range(_LISTING_TRIES if sizes else 0):
        time.sleep(attempt)
        listed = wandb.Api(timeout=_LISTING_TIMEOUT_S).run(path).files(per_page=1000)
        missing -= {file.name for file in listed if sizes.get(file.name) == file.size}
        if not missing:
            return
    if missing:
        raise TrackingError(f"{len(missing)} of {len(sizes)} files did not arrive")


def _settings(folder: Path) -> Any:
    import wandb

    return wandb.Settings(
        root_dir=str(folder),
        init_timeout=START_TIMEOUT_S,
        console="off",
        silent=True,
        disable_git=True,  # the code's version is in the checkpoint
        # Host, user and command line with its URLs are private.
        x_disable_meta=True,
        host="not told",
        program="not told",
        save_code=False,
        x_save_requirements=False,
    )
