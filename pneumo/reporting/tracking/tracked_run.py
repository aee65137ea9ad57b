"""One W&B run as a value: what W&B is told of a training, an evaluation, a trial or a search.

Each is built from the run's folder alone, so it can be sent again at any time, and tests compare
values. What no other file of the run holds in the form that W&B gets lies in `<run>/tracking/`:

    identity         random; with the run's URL it makes the ids, so the same URL used for a new
                     training after its folder was deleted is a new run at W&B
    dataset.json     the store's manifest
    evaluation.json, pictures.parquet, report.html    of an evaluation
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pneumo import storage
from pneumo.config import Config, TrackingConfig
from pneumo.config_layers import drop_removed
from pneumo.dataset.manifest import Manifest
from pneumo.errors import TrackingError
from pneumo.reporting.tracking.media import Artifact, Media, Scalar

FOLDER = "tracking"
PHANTOM_NOTICE = "drawn phantoms, no radiographs: no number says anything of patients"
_IDENTITY, _DATASET = "identity", "dataset.json"
_MAX_NAME = 80


@dataclass(frozen=True)
class TrackedRun:
    """All that one W&B run is told. Keys start with data/, train/, val/, eval/, tune/ or perf/."""

    id: str
    name: str
    group: str
    job_type: Literal["train", "evaluate", "external", "tune", "tune-trial"]
    tracking: TrackingConfig
    """Whose `project` and `entity` it belongs to."""
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()
    """Scalars of each epoch, with `epoch`, in order."""
    media: Mapping[str, Media] = field(default_factory=dict)
    summary: Mapping[str, Scalar] = field(default_factory=dict)
    inputs: Sequence[Artifact] = ()
    outputs: Sequence[Artifact] = ()
    is_finished: bool = True
    """Whether it came to its own end; at W&B it has failed otherwise."""

    @property
    def full_config(self) -> dict[str, Any]:
        """The config with the names of the inputs."""
        named = [{"name": one.name, "type": one.type, **one.metadata} for one in self.inputs]
        return {**self.config, **({"inputs": named} if named else {})}


def prepare_tracking(run_url: str, manifest: Manifest) -> None:
    """Write what a new run needs in order to be sent; an identity that is there stays."""
    if not storage.exists(_url(run_url, _IDENTITY)):
        renew_identity(run_url)
    storage.write_text(_url(run_url, _DATASET), manifest.model_dump_json(indent=1))


def renew_identity(run_url: str) -> None:
    """Let W&B have this run under new ids."""
    storage.write_text(_url(run_url, _IDENTITY), uuid.uuid4().hex)


def name_run(run_url: str) -> str:
    """The last part of the URL and eight digits that tell it from others: `train-3f9c2a1b`.

    W&B's id of a training or a search, and the stem of all other names of the run there.
    """
    identity = _read(_url(run_url, _IDENTITY)) or ""
    digest = hashlib.sha256(f"{run_url} {identity}".encode()).hexdigest()
    return f"{make_name(run_url.rsplit('/', 1)[-1])[:_MAX_NAME]}-{digest[:8]}"


def name_group(run_url: str) -> str:
    """W&B's group of a training and of what is made with its weights, if not told otherwise."""
    try:
        config = read_config(run_url)
    except TrackingError:  # of another version
        config = None
    return (config and config.tracking.group) or name_run(run_url)


def make_name(text: str) -> str:
    """The text in the letters that W&B takes for ids and names of artifacts."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)


def read_dataset(run_url: str) -> Manifest | None:
    """The manifest of the store that the run used; None of a run that an older version made."""
    text = _read(_url(run_url, _DATASET))
    return None if text is None else Manifest.model_validate_json(text)


def read_config(run_url: str) -> Config | None:
    """The settings of the run's training or search; None where there are none.

    Raises TrackingError where they are not of this version.
    """
    text = _read(storage.join(run_url, "config.json"))
    try:
        return None if text is None else Config.model_validate(drop_removed(json.loads(text)))
    except ValueError as error:
        raise TrackingError(f"{run_url}/config.json: not of this version of pneumo") from error


def describe_store(manifest: Manifest | None) -> dict[str, str | None]:
    """What a run's config says of its store."""
    if manifest is None:
        return {}
    named = {} if manifest.audit.named is None else {"data_split": manifest.audit.named}
    return {
        "dataset_digest": manifest.digest,
        "data_warning": manifest.audit.warning,
        "data_layout": manifest.layout,
        **named,
        **({"phantoms": PHANTOM_NOTICE} if manifest.phantoms else {}),
    }


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are None."""
    return {name: value for name, value in values.items() if value is not None}


def _url(run_url: str, name: str) -> str:
    return storage.join(run_url, FOLDER, name)


def _read(url: str) -> str | None:
    try:
        return storage.read_text(url)
    except FileNotFoundError:
        return None
