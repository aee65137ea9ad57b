"""Self-describing checkpoints: all that is needed to resume, to score, and to identify the model.

A run's `checkpoints/index.json` is written after the file it names, and holds the file's SHA-256;
a checkpoint that is not in the index is ignored.

Only one attempt at a run may write: the one with the highest id, as `claim_run` gives them. A lost
attempt may continue for minutes on an unreachable node, and a write that it began may arrive at any
time. So each attempt has a copy of the index, `claim-<id>.json`, which no other one writes; it
counts where index.json is not that of the highest id. File names contain the id too, so no two
attempts write the same file.
"""

import hashlib
import io
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ValidationError

from pneumo import storage
from pneumo.config import WEIGHTS_WITHOUT_FILE, Config
from pneumo.config_layers import drop_removed, override
from pneumo.errors import CheckpointError, ContentError, RunError
from pneumo.network.backbones import build_model
from pneumo.network.scoring import Member
from pneumo.training.checkpoint_content import describe_versions, to_bytes

SCHEMA_VERSION = 2
_INDEX, _CLAIM = "index.json", "claim-"
_SUFFIX = ".pt"
AUROC_OF = {"raw": "val/auroc", "ema": "val/ema_auroc"}
"""The metric that decides which epoch is the best, by the weights used for scoring."""


class CheckpointEntry(BaseModel, frozen=True):
    """A checkpoint in the index."""

    name: str
    epoch: int
    """Completed epochs."""
    step: int = 0
    """Completed steps of the current epoch."""
    val_auroc: float | None
    """With the weights used for scoring; None in mid-epoch and where undefined."""
    weights: Literal["raw", "ema"] = "raw"
    """The weights used for scoring: with EMA their average."""
    sha256: str


class CheckpointIndex(BaseModel, frozen=True):
    """The run's checkpoints, oldest first."""

    schema_version: int = SCHEMA_VERSION
    attempt: str = ""
    """The id of the attempt that may write."""
    finished: bool = False
    """Whether the run has ended: after all its epochs, or early."""
    stopped_early: bool = False
    """Whether it ended because val AUROC did not improve for `train.patience` epochs."""
    entries: tuple[CheckpointEntry, ...] = ()

    @property
    def latest(self) -> CheckpointEntry:
        """The newest checkpoint."""
        return self.entries[-1]

    @property
    def best(self) -> CheckpointEntry:
        """The checkpoint with the highest val AUROC; the newest where none has one."""
        scored = [entry for entry in self.entries if entry.val_auroc is not None]
        return max(scored, key=lambda entry: entry.val_auroc or 0.0) if scored else self.latest

    def until(self, entry: CheckpointEntry) -> Self:
        """The index without the checkpoints after `entry`."""
        return self.model_copy(update={"entries": self.entries[: self.entries.index(entry) + 1]})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    epoch: int
    """Completed epochs."""
    config: Config
    manifest_digest: str
    image_size: int
    mean: float
    std: float
    history: tuple[dict[str, float | None], ...]
    """The metrics of each completed epoch."""
    initialisation: str
    """`Initialisation.source`."""
    code_version: str
    """Package version and git revision."""
    ema: dict[str, torch.Tensor] | None = None
    """The average of the weights, with EMA."""
    step: int = 0
    """Completed steps of the current epoch. All random numbers and the data order are functions of
    (seed, epoch, step), so no state of a random generator is saved."""
    epoch_loss: float = 0.0
    """Sum of these steps' losses."""
    grad_norm: float | None = None
    """The last gradient norm computed in these steps."""
    samples_fed: int = 0
    """Samples in these steps, on all ranks."""
    versions: dict[str, str] = field(default_factory=describe_versions)
    """See `describe_versions`."""

    @property
    def weights(self) -> Literal["raw", "ema"]:
        """Which weights to score with."""
        return "raw" if self.ema is None else "ema"

    @property
    def val_auroc(self) -> float | None:
        """With the weights to score with; None in mid-epoch and where undefined."""
        if self.step or not self.history:
            return None
        return self.history[-1][AUROC_OF[self.weights]]

    @property
    def scored_model(self) -> dict[str, torch.Tensor]:
        """The weights to score with."""
        return self.model if self.ema is None else self.ema


def claim_run(run_url: str, index: CheckpointIndex | None = None) -> str:
    """Make a new attempt the run's only writer, resuming from the newest of `index`. Returns its
    id.

    Removes what a lost attempt left: files that are not in `index`, and partly written files.
    """
    claims = _list_claims(run_url)
    number = 1 + max((int(name[len(_CLAIM) : len(_CLAIM) + 6]) for name in claims), default=0)
    attempt = f"{number:06d}{uuid.uuid4().hex[:8]}"
    claimed = CheckpointIndex(attempt=attempt, entries=() if index is None else index.entries)
    _write_index(run_url, claimed)
    files = _list_files(run_url)
    check_claim(run_url, attempt)  # what an attempt with a higher claim has written stays
    for name in {*claims, *files} - {entry.name for entry in claimed.entries}:
        storage.remove(_url(run_url, name))
    storage.remove_partials(storage.join(run_url, "checkpoints"))
    return attempt


def check_claim(run_url: str, attempt: str) -> CheckpointIndex:
    """The run's current index. Raises RunError when another attempt has claimed the run."""
    index = _read_index(run_url)
    if index is None or index.attempt != attempt:
        raise RunError(
            f"{run_url}: another attempt has claimed this run, so this one ({attempt}) writes "
            "nothing more; was the same --run started twice?"
        )
    return index


def save_checkpoint(
    run_url: str,
    checkpoint: Checkpoint,
    *,
    attempt: str,
    keep_last: int,
    finished: bool,
    stopped_early: bool = False,
) -> None:
    """Write the checkpoint, then the index; then remove all but the best, the last `keep_last` at
    the end of an epoch, and the last `keep_last` within the current epoch.

    Raises RunError, and writes nothing, when another attempt has claimed the run.
    """
    check_claim(run_url, attempt)
    data = to_bytes(
        {
            **vars(checkpoint),
            "schema_version": SCHEMA_VERSION,
            "config": checkpoint.config.model_dump(mode="json"),
            "history": list(checkpoint.history),
        }
    )
    step = f"-step-{checkpoint.step:06d}" if checkpoint.step else ""
    entry = CheckpointEntry(
        name=f"epoch-{checkpoint.epoch:04d}{step}-{attempt}{_SUFFIX}",
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        val_auroc=checkpoint.val_auroc,
        weights=checkpoint.weights,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    storage.write_bytes(_url(run_url, entry.name), data)
    old = check_claim(run_url, attempt)  # again: the upload may have taken minutes
    entries = (*old.entries, entry)
    kept = _select_kept(entries, keep_last)
    _write_index(
        run_url,
        CheckpointIndex(
            attempt=attempt, finished=finished, stopped_early=stopped_early, entries=kept
        ),
    )
    if stale := {e.name for e in entries} - {e.name for e in kept}:
        check_claim(run_url, attempt)  # another attempt may resume from them
    for name in stale:
        storage.remove(_url(run_url, name))


def _select_kept(
    entries: tuple[CheckpointEntry, ...], keep_last: int
) -> tuple[CheckpointEntry, ...]:
    best = CheckpointIndex(entries=entries).best
    epoch_ends = [entry for entry in entries if entry.step == 0]
    # Those within an epoch are not needed once it has ended.
    epochs = epoch_ends[-1].epoch if epoch_ends else 0
    mid_epoch = [entry for entry in entries if entry.step and entry.epoch >= epochs]
    kept = [best, *epoch_ends[-keep_last:], *mid_epoch[-keep_last:]]
    return tuple(entry for entry in entries if entry in kept)


def load_newest(
    run_url: str, index: CheckpointIndex, tell: Callable[[str], None] = lambda line: None
) -> tuple[CheckpointEntry, Checkpoint]:
    """The newest valid checkpoint; `tell` gets a warning of each invalid one.

    Raises CheckpointError when the index has no valid one.
    """
    for number, entry in enumerate(reversed(index.entries), 1):
        try:
            return entry, load_checkpoint(run_url, entry)
        except CheckpointError as error:
            if number == len(index.entries):
                raise
            tell(f"warning: {error}; using the one before it")
    raise CheckpointError(f"{run_url}: no checkpoint in its index")


def find_index(run_url: str) -> CheckpointIndex | None:
    """The run's index, or None where it has no checkpoint. Raises CheckpointError."""
    index = _read_index(run_url)
    return index if index is not None and index.entries else None


def find_weights(config: Config) -> Config:
    """`config` with absolute paths as `model.weights`, also in the search space, as workers have
    other working folders; for a run's folder the path of its best checkpoint. Raises RunError for a
    run without a checkpoint, CheckpointError."""

    def find(weights: object) -> str:
        if weights in WEIGHTS_WITHOUT_FILE:
            return str(weights)
        url = storage.normalise(str(weights))
        if storage.exists(_url(url, _INDEX)):
            url = _url(url, read_index(url).best.name)
        return url

    changes: dict[str, Any] = {"model.weights": find(config.model.weights)}
    if domain := config.tune.space.get("model.weights"):
        found = [domain.kind, *map(find, domain.values)]
        changes["tune.space"] = config.tune.model_dump()["space"] | {"model.weights": found}
    return override(config, changes)


def read_index(run_url: str) -> CheckpointIndex:
    """The run's index. Raises RunError where there is no checkpoint."""
    index = find_index(run_url)
    if index is None:
        raise RunError(
            f"{run_url}: no checkpoint in it; train first, or give a run that was trained"
        )
    return index


def load_checkpoint(run_url: str, entry: CheckpointEntry) -> Checkpoint:
    """Read a checkpoint of the index; tensors are on the CPU.

    Only tensors and plain values are unpickled; a file with code is refused. Raises
    CheckpointError.
    """
    url = _url(run_url, entry.name)
    try:
        data = storage.read_bytes(url, sha256=entry.sha256)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: listed in the index, but missing") from error
    except ContentError as error:
        raise CheckpointError(
            f"{url}: its SHA-256 differs from the index; it was changed or truncated"
        ) from error
    try:
        plain = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{url}: not a readable checkpoint") from error
    found = plain.pop("schema_version", None) if isinstance(plain, dict) else None
    if found != SCHEMA_VERSION:
        raise CheckpointError(
            f"{url}: of another schema than {SCHEMA_VERSION} ({found!r}); use the pneumo that "
            "wrote it, or train again"
        )
    try:
        plain["config"] = Config.model_validate(drop_removed(dict(plain["config"])))
        plain["history"] = tuple(plain["history"])
        plain.pop("digest_fed", None)  # of earlier versions
        return Checkpoint(**plain)
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{url}: written by another version of pneumo") from error


def load_member(run_url: str, entry: CheckpointEntry, device: str = "cpu") -> Member:
    """A checkpoint's network, in evaluation mode, on `device`. Raises CheckpointError."""
    checkpoint = load_checkpoint(run_url, entry)
    backbone = checkpoint.config.model.backbone
    network = build_model(backbone)
    network.load_state_dict(checkpoint.scored_model)
    network.to(device)
    network.to(memory_format=torch.channels_last)
    size, mean, std = checkpoint.image_size, checkpoint.mean, checkpoint.std
    return Member(network.eval(), backbone, size, mean, std)


def _read_index(run_url: str) -> CheckpointIndex | None:
    try:
        index = _parse_index(_url(run_url, _INDEX))
        claims = _list_claims(run_url)
        if claims and claims[-1] != f"{_CLAIM}{index.attempt}.json":  # a late write
            index = _parse_index(_url(run_url, claims[-1]))
    except FileNotFoundError as error:
        if storage.exists(url := _url(run_url, _INDEX)):  # a higher claim has removed the copy
            return _read_index(run_url)
        # Not a fresh run: `claim_run` would delete them.
        if _list_files(run_url):
            raise CheckpointError(
                f"{url}: missing, though there are checkpoints, whose digests it has; "
                "restore it, or give another --run"
            ) from error
        return None
    return index


def _parse_index(url: str) -> CheckpointIndex:
    try:
        index = CheckpointIndex.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise CheckpointError(
            f"{url}: not an index of checkpoints of this version; restore a copy of it, or give "
            "another --run"
        ) from error
    if index.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{url}: schema {index.schema_version}, this version reads {SCHEMA_VERSION}; use the "
            "pneumo that wrote it, or train again"
        )
    return index


def _write_index(run_url: str, index: CheckpointIndex) -> None:
    for name in (f"{_CLAIM}{index.attempt}.json", _INDEX):
        storage.write_text(_url(run_url, name), index.model_dump_json(indent=1) + "\n")


def _list_claims(run_url: str) -> list[str]:
    """File names of the attempts' copies of the index, the highest claim last."""
    names = storage.list_names(storage.join(run_url, "checkpoints"))
    return [name for name in names if re.fullmatch(rf"{_CLAIM}\d{{6}}[0-9a-f]{{8}}\.json", name)]


def _list_files(run_url: str) -> list[str]:
    """File names of the run's checkpoints, in the index or not."""
    names = storage.list_names(storage.join(run_url, "checkpoints"))
    return [name for name in names if name.endswith(_SUFFIX)]


def _url(run_url: str, name: str) -> str:
    return storage.join(run_url, "checkpoints", name)
