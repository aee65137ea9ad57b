"""What a training run goes on from: chosen by rank 0, the same on all ranks."""

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
    CheckpointEntry,
    CheckpointIndex,
    claim_run,
    find_index,
    load_checkpoint,
    load_newest,
)


@dataclass(frozen=True, eq=False)
class Resumption:
    """Where an attempt at a run begins."""

    attempt: str
    """The id under which it writes."""
    checkpoint: Checkpoint | None
    """What it goes on from; None from the start."""


def claim_and_resume(
    config: Config,
    manifest: Manifest,
    run_url: str,
    world: World,
    tell: Callable[[str], None] = lambda line: None,
) -> Resumption:
    """Make this attempt the run's only writer, and load what it goes on from.

    Rank 0 chooses, and the others load the very file that it chose, so ranks that see the folder
    differently (a cache of NFS's, a write that has just come) never go on from different steps.
    Raises on every rank what rank 0's choice raised: RunError, CheckpointError, StorageError; and
    CheckpointError on a rank that cannot read the same bytes.
    """
    checkpoint: Checkpoint | None = None
    chosen: list[Any] = [None]
    if world.rank == 0:
        try:
            attempt, entry, checkpoint = _claim(config, manifest, run_url, tell)
            chosen = [(attempt, entry)]
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


def _claim(
    config: Config, manifest: Manifest, run_url: str, tell: Callable[[str], None]
) -> tuple[str, CheckpointEntry | None, Checkpoint | None]:
    """The attempt's id, and the newest whole checkpoint, if there is any."""
    last = find_last(config, manifest, run_url, tell)
    if last is None:
        return claim_run(run_url), None, None
    index, checkpoint = last
    return claim_run(run_url, index), index.latest, checkpoint


def find_last(
    config: Config,
    manifest: Manifest,
    run_url: str,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[CheckpointIndex, Checkpoint] | None:
    """The run's newest whole checkpoint behind the index up to it, or None where nothing has been
    trained.

    Raises FinishedError when the run is finished, RunError when it is of another configuration or
    store, CheckpointError when none of its checkpoints is whole.
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
            f"{run_url}: was begun on another store (manifest {checkpoint.manifest_digest[:12]}, "
            f"not {manifest.digest[:12]}); give another --run"
        )
    changed = changed_sections(checkpoint.config, config)
    if changed:
        raise RunError(
            f"{run_url}: was begun with other settings in {', '.join(changed)}; repeat them to go "
            "on, or give another --run"
        )
    return index.until(entry), checkpoint
