"""One W&B run as a value: what is sent of a training, an evaluation, a trial or a search.

It is built from the run's folder alone, so it can be sent again at any time. `<run>/tracking/` has
what W&B gets and no other file of the run has:

    identity         random; W&B's ids are made of it and of the run's URL, so a new training at the
                     URL of a deleted one is a new run at W&B
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
    """The content of one W&B run. Keys start with data/, train/, val/, eval/, tune/ or perf/."""

    id: str
    name: str
    group: str
    job_type: Literal["train", "evaluate", "external", "tune", "tune-trial"]
    tracking: TrackingConfig
    """Has the `project` and the `entity`."""
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, float]] = ()
    """Scalars of each epoch, with `epoch`, in order."""
    media: Mapping[str, Media] = field(default_factory=dict)
    summary: Mapping[str, Scalar] = field(default_factory=dict)
    inputs: Sequence[Artifact] = ()
    outputs: Sequence[Artifact] = ()
    is_finished: bool = True
    """Whether the job finished; otherwise the run is marked as failed at W&B."""

    @property
    def full_config(self) -> dict[str, Any]:
        """The config with the names of the inputs."""
        named = [{"name": one.name, "type": one.type, **one.metadata} for one in self.inputs]
        return {**self.config, **({"inputs": named} if named else {})}


def prepare_tracking(run_url: str, manifest: Manifest) -> None:
    """Write what a new run needs to be sent; an existing identity is kept."""
    if not storage.exists(_url(run_url, _IDENTITY)):
        renew_identity(run_url)
    storage.write_text(_url(run_url, _DATASET), manifest.model_dump_json(indent=1))


def renew_identity(run_url: str) -> None:
    """Give this run new ids at W&B."""
    storage.write_text(_url(run_url, _IDENTITY), uuid.uuid4().hex)


def make_run_id(run_url: str) -> str:
    """The last part of the URL and eight hexadecimal digits: `train-3f9c2a1b`.

    It is W&B's id of a training or a search, and the stem of the run's other names at W&B.
    """
    identity = storage.find_text(_url(run_url, _IDENTITY)) or ""
    digest = hashlib.sha256(f"{run_url} {identity}".encode()).hexdigest()
    return f"{to_wandb_name(run_url.rsplit('/', 1)[-1])[:_MAX_NAME]}-{digest[:8]}"


def name_group(run_url: str) -> str:
    """W&B's group of a training and of all that uses its weights, unless configured."""
    try:
        config = read_config(run_url)
    except TrackingError:  # of another version
        config = None
    return (config and config.tracking.group) or make_run_id(run_url)


def to_wandb_name(text: str) -> str:
    """The text with only the characters that W&B allows in ids and artifact names."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)


def read_dataset(run_url: str) -> Manifest | None:
    """The manifest of the store that the run used; None of a run that an older version made."""
    text = storage.find_text(_url(run_url, _DATASET))
    return None if text is None else Manifest.model_validate_json(text)


def read_config(run_url: str) -> Config | None:
    """The settings of the run's training or search; None where there are none.

    Raises TrackingError where they are not of this version.
    """
    text = storage.find_text(storage.join(run_url, "config.json"))
    try:
        return None if text is None else Config.model_validate(drop_removed(json.loads(text)))
    except ValueError as error:
        raise TrackingError(f"{run_url}/config.json: not of this version of pneumo") from error


def choose_tracking(trained: Config | None, given: Mapping[str, Any]) -> TrackingConfig:
    """The settings of the training, except those that a later job was `given` itself."""
    own = {} if trained is None else trained.tracking.model_dump()
    return TrackingConfig.model_validate({**own, **given})


def read_files(run_url: str, marker: str, *others: str) -> list[bytes] | None:
    """The contents of files of the run; None where there is no `marker`, which is written last.

    Raises TrackingError where another is missing.
    """
    if not storage.exists(storage.join(run_url, marker)):
        return None
    contents = []
    for name in (marker, *others):
        try:
            contents.append(storage.read_bytes(storage.join(run_url, name)))
        except FileNotFoundError as error:
            raise TrackingError(
                f"{run_url}/{name}: missing; the evaluation is of an older version, or was copied "
                "in part; evaluate the run again"
            ) from error
    return contents


def describe_store(manifest: Manifest | None) -> dict[str, str | None]:
    """The store's part of a run's config."""
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


def drop_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are None."""
    return {name: value for name, value in values.items() if value is not None}


def _url(run_url: str, name: str) -> str:
    return storage.join(run_url, FOLDER, name)
