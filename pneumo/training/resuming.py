"""Resuming: rank 0 chooses the checkpoint, and all ranks load the same one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pneumo.config import Config, changed_sections
from pneumo.dataset.manifest import Manifest
from pneumo.errors import FinishedError, PneumoError, RunError
from pneumo.loading.sample_order import World
from pneumo.training.checkpoints import (
    Checkpoint,
    CheckpointIndex,
    claim_run,
    find_index,
    load_checkpoint,
    load_newest,
)


@dataclass(frozen=True, eq=False)
class Resumption:
    """Where an attempt at a run starts."""

    attempt: str
    """The attempt's id."""
    checkpoint: Checkpoint | None
    """The checkpoint to resume from; None for a fresh run."""


def claim_and_resume(
    config: Config,
    manifest: Manifest,
    run_url: str,
    world: World,
    tell: Callable[[str], None] = lambda line: None,
) -> Resumption:
    """Make this attempt the run's only writer, and load the checkpoint to resume from.

    Rank 0 chooses the file and the others load the same one: ranks that see different folder
    contents (NFS's cache, a recent write) never resume from different steps. All ranks raise what
    rank 0 raised while choosing: RunError, CheckpointError, StorageError. A rank that cannot read
    the same bytes raises CheckpointError.
    """
    checkpoint: Checkpoint | None = None
    chosen: list[Any] = [None]
    if world.rank == 0:
        try:
            index, checkpoint = find_newest(config, manifest, run_url, tell) or (None, None)
            chosen = [(claim_run(run_url, index), None if index is None else index.latest)]
        except PneumoError as error:
            chosen = [error]
    if world.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    if isinstance(chosen[0], PneumoError):
        raise chosen[0]
    attempt, entry = chosen[0]
    if world.rank > 0 and entry is not None:
        checkpoint = load_checkpoint(run_url, entry)
    return Resumption(attempt, checkpoint)


def find_newest(
    config: Config,
    manifest: Manifest,
    run_url: str,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[CheckpointIndex, Checkpoint] | None:
    """The run's newest valid checkpoint, after the index up to it; None for a fresh run.

    Raises FinishedError when the run is finished, RunError when it was started with other settings
    or on another store, CheckpointError when none of its checkpoints is valid.
    """
    index = find_index(run_url)
    if index is None:
        return None
    if index.finished:
        raise FinishedError(
            f"{run_url}: holds a finished run of {index.latest.epoch} epochs; give another --run"
        )
    entry, checkpoint = load_newest(run_url, index, tell)
    if checkpoint.manifest_digest != manifest.digest:
        raise RunError(
            f"{run_url}: was started on another store (manifest {checkpoint.manifest_digest[:12]}, "
            f"not {manifest.digest[:12]}); give another --run"
        )
    changed = changed_sections(checkpoint.config, config)
    if changed:
        raise RunError(
            f"{run_url}: was started with other settings in {', '.join(changed)}; repeat them to "
            "resume, or give another --run"
        )
    return index.until(entry), checkpoint
