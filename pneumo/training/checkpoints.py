"""Self-describing checkpoints: all that is needed to go on, to score, and to know what this is.

A run's `checkpoints/index.json` is written after the file it names, and holds the file's SHA-256;
a checkpoint that the index does not name does not count.

Only one attempt at a run may write: the one whose id the index carries, put there by `claim_run`. A
lost attempt may go on for minutes on a node that nobody reaches; what it writes late changes
nothing, as its id is no longer there. The id is in the names of its files too, so no two attempts
write the same one.
"""

import hashlib
import io
import os
import platform
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ValidationError

from pneumo import storage
from pneumo.config import WEIGHTS_WITHOUT_FILE, Config
from pneumo.config_layers import drop_removed, override, with_absolute_weights
from pneumo.errors import CheckpointError, ContentError, RunError
from pneumo.network.backbones import build_model
from pneumo.network.scoring import Member

SCHEMA_VERSION = 2
_INDEX = "index.json"
_SUFFIX = ".pt"
AUROC_OF = {"raw": "val/auroc", "ema": "val/ema_auroc"}
"""The metric that says which epoch is the best, by the weights that are scored with."""


class CheckpointEntry(BaseModel, frozen=True):
    """What the index says of one checkpoint."""

    name: str
    epoch: int
    """Epochs completed."""
    step: int = 0
    """Steps done of the epoch after them."""
    val_auroc: float | None
    """Of the weights that are scored with; None in mid-epoch and where undefined."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights are scored with: the average where the run keeps one."""
    sha256: str


class CheckpointIndex(BaseModel, frozen=True):
    """The run's checkpoints, oldest first."""

    schema_version: int = SCHEMA_VERSION
    attempt: str = ""
    """The id of the attempt that may write."""
    finished: bool = False
    """Whether the run has ended: after all its epochs, or early."""
    stopped_early: bool = False
    """Whether it ended because `train.patience` epochs brought nothing better."""
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

    def until(self, entry: CheckpointEntry) -> Self:
        """The same without what comes after `entry`."""
        return self.model_copy(update={"entries": self.entries[: self.entries.index(entry) + 1]})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    epoch: int
    """Epochs completed."""
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
    ema: dict[str, torch.Tensor] | None = None
    """The average of the weights, where the run keeps one."""
    step: int = 0
    """Steps done of the epoch after them. (seed, epoch, step) is the whole data position, and every
    random draw is made from it: there is no generator whose state would have to be kept."""
    epoch_loss: float = 0.0
    """Sum of these steps' losses."""
    grad_norm: float | None = None
    """Of the gradient in these steps, when it was last taken."""
    samples_fed: int = 0
    """What these steps were fed, on all ranks."""
    versions: dict[str, str] = field(default_factory=lambda: describe_versions())
    """Of Python, torch and the like: `describe_versions`."""

    @property
    def weights(self) -> Literal["raw", "ema"]:
        """Which weights to score with."""
        return "raw" if self.ema is None else "ema"

    @property
    def val_auroc(self) -> float | None:
        """Of the weights to score with; None in mid-epoch and where undefined."""
        if self.step or not self.history:
            return None
        return self.history[-1][AUROC_OF[self.weights]]

    @property
    def scored_model(self) -> dict[str, torch.Tensor]:
        """The weights to score with."""
        return self.model if self.ema is None else self.ema


def claim_run(run_url: str, index: CheckpointIndex | None = None) -> str:
    """Make a new attempt the run's only writer, which goes on after the newest of `index`; its id.

    What a lost attempt left is removed: files that `index` does not name, and halves of files.
    """
    attempt = uuid.uuid4().hex[:8]
    claimed = CheckpointIndex(attempt=attempt, entries=() if index is None else index.entries)
    _write_index(run_url, claimed)
    _remove_unlisted(run_url, {entry.name for entry in claimed.entries})
    return attempt


def check_claim(run_url: str, attempt: str) -> CheckpointIndex:
    """The run's index as it is now. Raises RunError when the run is no longer this attempt's."""
    index = _read_index(run_url)
    if index is None or index.attempt != attempt:
        raise RunError(
            f"{run_url}: another attempt has taken this run over, so this one ({attempt}) writes "
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
    """Write the checkpoint, then the index; then drop what is neither the best nor among the last
    `keep_last`: of those of whole epochs, and of those within the epoch after them.

    Raises RunError, and touches nothing, when the run is not `attempt`'s.
    """
    check_claim(run_url, attempt)
    data = _serialise(checkpoint)
    behind = f"-step-{checkpoint.step:06d}" if checkpoint.step else ""
    entry = CheckpointEntry(
        name=f"epoch-{checkpoint.epoch:04d}{behind}-{attempt}{_SUFFIX}",
        epoch=checkpoint.epoch,
        step=checkpoint.step,
        val_auroc=checkpoint.val_auroc,
        weights=checkpoint.weights,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    storage.write_bytes(_url(run_url, entry.name), data)
    old = check_claim(run_url, attempt)  # again: the bytes may have been under way for minutes
    entries = (*old.entries, entry)
    kept = _select_kept(entries, keep_last)
    _write_index(
        run_url,
        CheckpointIndex(
            attempt=attempt, finished=finished, stopped_early=stopped_early, entries=kept
        ),
    )
    for stale in {e.name for e in entries} - {e.name for e in kept}:
        storage.remove(_url(run_url, stale))


def _select_kept(
    entries: tuple[CheckpointEntry, ...], keep_last: int
) -> tuple[CheckpointEntry, ...]:
    best = CheckpointIndex(entries=entries).best
    whole = [entry for entry in entries if entry.step == 0]
    # Once an epoch has a checkpoint of its own, those within it are not needed.
    epochs = whole[-1].epoch if whole else 0
    inside = [entry for entry in entries if entry.step and entry.epoch >= epochs]
    wanted = [best, *whole[-keep_last:], *inside[-keep_last:]]
    return tuple(entry for entry in entries if entry in wanted)


def _serialise(checkpoint: Checkpoint) -> bytes:
    return to_bytes(
        {
            **vars(checkpoint),
            "schema_version": SCHEMA_VERSION,
            "config": checkpoint.config.model_dump(mode="json"),
            "history": list(checkpoint.history),
        }
    )


def to_bytes(state: dict[str, Any]) -> bytes:
    """What torch.save makes of `state`, by way of a file in memory (Linux's memfd).

    torch writes to a file without Python's lock. With a BytesIO it holds the lock, and the steps
    that train meanwhile take 2.5 times as long on the host.
    """
    # Other systems have no memfd, and a limit on a file's size holds for it too.
    with (
        suppress(AttributeError, OSError, RuntimeError),
        os.fdopen(os.memfd_create("checkpoint"), "rb", buffering=0) as file,
    ):
        torch.save(state, f"/proc/self/fd/{file.fileno()}")
        return file.read()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def copy_to_cpu(state: Any) -> Any:
    """A state dict of tensors, lists and plain values, its tensors copied to the CPU."""
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copy_to_cpu(value) for value in state]
    return state


def load_newest(
    run_url: str, index: CheckpointIndex, tell: Callable[[str], None] = lambda line: None
) -> tuple[CheckpointEntry, Checkpoint]:
    """The newest checkpoint that is whole; `tell` hears of each that is not.

    Raises CheckpointError when none of the index's is.
    """
    for number, entry in enumerate(reversed(index.entries), 1):
        try:
            return entry, load_checkpoint(run_url, entry)
        except CheckpointError as error:
            if number == len(index.entries):
                raise
            tell(f"warning: {error}; taking the one before it")
    raise CheckpointError(f"{run_url}: no checkpoint in its index")


def find_index(run_url: str) -> CheckpointIndex | None:
    """The run's index, or None where nothing has been trained. Raises CheckpointError."""
    index = _read_index(run_url)
    return index if index is not None and index.entries else None


def find_weights(config: Config) -> Config:
    """The same, `model.weights` a whole path, as workers run in folders of their own; for a run's
    folder, that of its best checkpoint. Raises RunError for a run without one, CheckpointError."""
    config = with_absolute_weights(config)
    url = config.model.weights
    if url in WEIGHTS_WITHOUT_FILE or not storage.exists(_url(url, _INDEX)):
        return config
    return override(config, {"model.weights": _url(url, read_index(url).best.name)})


def read_index(run_url: str) -> CheckpointIndex:
    """The run's index. Raises RunError where there is no checkpoint."""
    index = find_index(run_url)
    if index is None:
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
        data = storage.read_bytes(url, sha256=entry.sha256)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: the index names it, but it is gone") from error
    except ContentError as error:
        raise CheckpointError(
            f"{url}: its SHA-256 is not the index's; it was changed or cut"
        ) from error
    try:
        plain = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{url}: not a readable checkpoint") from error
    found = plain.pop("schema_version", None) if isinstance(plain, dict) else None
    if found != SCHEMA_VERSION:
        raise CheckpointError(
            f"{url}: of another schema than {SCHEMA_VERSION} ({found!r}); use the pneumo that "
            "wrote it, or train anew"
        )
    try:
        plain["config"] = Config.model_validate(drop_removed(dict(plain["config"])))
        plain["history"] = tuple(plain["history"])
        plain.pop("digest_fed", None)  # of earlier versions
        return Checkpoint(**plain)
    except (AttributeError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{url}: written by another version of pneumo") from error


def load_member(run_url: str, entry: CheckpointEntry, device: str = "cpu") -> Member:
    """A checkpoint's network, in evaluation mode. Raises CheckpointError."""
    checkpoint = load_checkpoint(run_url, entry)
    backbone = checkpoint.config.model.backbone
    network = build_model(backbone)
    network.load_state_dict(checkpoint.scored_model)
    network.to(device)
    network.to(memory_format=torch.channels_last)
    size, mean, std = checkpoint.image_size, checkpoint.mean, checkpoint.std
    return Member(network.eval(), backbone, size, mean, std)


def describe_versions() -> dict[str, str]:
    """Versions of Python, torch, torchvision, Ray and CUDA, where they are installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "ray"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _read_index(run_url: str) -> CheckpointIndex | None:
    url = _url(run_url, _INDEX)
    try:
        index = CheckpointIndex.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError as error:
        # Taking this for a fresh run would delete them.
        if _list_files(run_url):
            raise CheckpointError(
                f"{url}: missing, though there are checkpoints, whose digests it holds; "
                "put it back, or give another --run"
            ) from error
        return None
    except ValidationError as error:
        raise CheckpointError(
            f"{url}: not an index of checkpoints of this version; put a copy of it back, or give "
            "another --run"
        ) from error
    if index.schema_version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{url}: schema {index.schema_version}, this version reads {SCHEMA_VERSION}; use the "
            "pneumo that wrote it, or train anew"
        )
    return index


def _write_index(run_url: str, index: CheckpointIndex) -> None:
    storage.write_text(_url(run_url, _INDEX), index.model_dump_json(indent=1) + "\n")


def _remove_unlisted(run_url: str, named: set[str]) -> None:
    for name in _list_files(run_url):
        if name not in named:
            storage.remove(_url(run_url, name))
    storage.remove_partials(storage.join(run_url, "checkpoints"))


def _list_files(run_url: str) -> list[str]:
    """Names of the run's checkpoints, whether or not the index knows them."""
    names = storage.list_names(storage.join(run_url, "checkpoints"))
    return [name for name in names if name.endswith(_SUFFIX)]


def _url(run_url: str, name: str) -> str:
    return storage.join(run_url, "checkpoints", name)
