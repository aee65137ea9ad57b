"""Self-describing checkpoints: all that is needed to go on, to score, and to know what this is.

A run's `checkpoints/index.json` is written after the file it names, and vouches for it by its
digest; a checkpoint that the index does not name is not there.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from pneumo import __version__, storage
from pneumo.config import Config
from pneumo.errors import CheckpointError, RunError

SCHEMA_VERSION = 1


class CheckpointEntry(BaseModel):
    """What the index says of one checkpoint."""

    model_config = ConfigDict(frozen=True)
    name: str
    epoch: int
    """Epochs completed."""
    val_auroc: float | None
    sha256: str


class CheckpointIndex(BaseModel):
    """The run's checkpoints, oldest first."""

    model_config = ConfigDict(frozen=True)
    schema_version: int = SCHEMA_VERSION
    finished: bool = False
    """Whether the run has trained all its epochs."""
    entries: tuple[CheckpointEntry, ...] = ()

    @property
    def latest(self) -> CheckpointEntry:
        """The newest."""
        return self.entries[-1]

    @property
    def best(self) -> CheckpointEntry:
        """The one of the highest val AUROC; the newest where none is defined."""
        scored = [entry for entry in self.entries if entry.val_auroc is not None]
        return max(scored, key=lambda entry: entry.val_auroc or 0.0) if scored else self.latest


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    epoch: int
    """Epochs completed: the data position, as the order depends on (seed, epoch) alone."""
    config: Config
    manifest_digest: str
    image_size: int
    mean: float
    std: float
    history: tuple[dict[str, float | None], ...]
    """The epochs' metrics so far."""
    initialisation: str
    """Where the first weights came from."""
    code_version: str
    """Package version and git revision."""


def save_checkpoint(
    run_url: str, checkpoint: Checkpoint, *, keep_last: int, finished: bool
) -> None:
    """Write the checkpoint, then the index; then drop what is neither the best nor among the
    last."""
    buffer = io.BytesIO()
    plain = {
        **{name: getattr(checkpoint, name) for name in checkpoint.__dataclass_fields__},
        "schema_version": SCHEMA_VERSION,
        "config": checkpoint.config.model_dump(mode="json"),
        "history": list(checkpoint.history),
    }
    torch.save(plain, buffer)
    entry = CheckpointEntry(
        name=f"epoch-{checkpoint.epoch:04d}.pt",
        epoch=checkpoint.epoch,
        val_auroc=checkpoint.history[-1]["val/auroc"] if checkpoint.history else None,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
    )
    storage.write_bytes(_url(run_url, entry.name), buffer.getvalue())
    old = find_index(run_url) or CheckpointIndex()
    entries = (*(e for e in old.entries if e.epoch < entry.epoch), entry)
    best = CheckpointIndex(entries=entries).best
    kept = tuple(e for e in entries if e in entries[-keep_last:] or e == best)
    _write_index(run_url, CheckpointIndex(finished=finished, entries=kept))
    for stale in {e.name for e in (*old.entries, *entries)} - {e.name for e in kept}:
        storage.remove(_url(run_url, stale))


def find_index(run_url: str) -> CheckpointIndex | None:
    """The run's index, or None where nothing has been trained. Raises CheckpointError."""
    url = _url(run_url, "index.json")
    try:
        index = CheckpointIndex.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CheckpointError(f"{url}: not an index of checkpoints of this version") from error
    if index.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{url}: schema {index.schema_version}, this version reads {SCHEMA_VERSION}"
        )
    return index


def read_index(run_url: str) -> CheckpointIndex:
    """The run's index. Raises RunError where there is no checkpoint."""
    index = find_index(run_url)
    if index is None or not index.entries:
        raise RunError(
            f"{run_url}: no checkpoint in it; train first, or give a run that was trained"
        )
    return index


def load_checkpoint(run_url: str, entry: CheckpointEntry) -> Checkpoint:
    """Read a checkpoint that the index names; tensors on the CPU.

    Only tensors and plain values are unpickled: a file that would run code is refused. Raises
    CheckpointError.
    """
    url = _url(run_url, entry.name)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: the index names it, but it is gone") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{url}: not what the index vouches for; it was changed or cut")
    try:
        plain = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{url}: not a readable checkpoint") from error
    if not isinstance(plain, dict) or plain.pop("schema_version", None) != SCHEMA_VERSION:
        raise CheckpointError(f"{url}: of another schema than {SCHEMA_VERSION}")
    try:
        plain["config"] = Config.model_validate(plain["config"])
        plain["history"] = tuple(plain["history"])
        return Checkpoint(**plain)
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{url}: written by another version of pneumo") from error


def describe_code() -> str:
    """Package version, and the git revision where the code lies in a checkout."""
    try:
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{revision}"


def _write_index(run_url: str, index: CheckpointIndex) -> None:
    storage.write_text(_url(run_url, "index.json"), index.model_dump_json(indent=1) + "\n")


def _url(run_url: str, name: str) -> str:
    return storage.join(run_url, "checkpoints", name)
