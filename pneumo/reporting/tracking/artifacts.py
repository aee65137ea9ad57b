"""What was made of what, as W&B artifacts: data set -> model -> evaluation.

A record of each goes into an artifact whose content is a digest, not the thing itself: shards and
weights stay where they are, and equal ones are one version. Each store and each run has names of
its own, so that `latest` and `best` speak of it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pneumo.dataset.manifest import Manifest
from pneumo.reporting.tracking.media import Artifact
from pneumo.training.checkpoints import CheckpointEntry


def describe_dataset(manifest: Manifest) -> Artifact:
    """The data as an artifact: the manifest, with the digest of every shard."""
    content = manifest.model_dump_json(indent=1).encode()
    return Artifact(
        name=f"dataset-{manifest.digest[:12]}",
        type="dataset",
        files={"manifest.json": content},
        metadata={"digest": manifest.digest},
    )


def record_weights(entry: CheckpointEntry, name: str, dataset: str | None) -> dict[str, Any]:
    """The record of a checkpoint of the run of this name, trained on the data of this digest."""
    return {
        "run": name,
        "checkpoint": entry.name,
        "epoch": entry.epoch,
        "val_auroc": entry.val_auroc,
        "sha256": entry.sha256,
        "dataset": dataset,
    }


def describe_weights(record: Mapping[str, Any], aliases: Sequence[str] = ()) -> Artifact:
    """A checkpoint as an artifact: its record. The weights themselves stay in the run's folder."""
    return Artifact(
        name=f"model-{record['run']}",
        type="model",
        files={"checkpoint.json": json.dumps(record, indent=1).encode()},
        aliases=aliases,
        metadata=record,
    )
