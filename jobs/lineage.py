"""What was made of what, as W&B artifacts: data set -> model -> evaluation.

A record of each goes into an artifact whose content is a digest, not the thing itself: shards and
weights stay where they are, and equal ones are one version.
"""

from __future__ import annotations

import json

from pneumo.checkpoint import CheckpointEntry
from pneumo.shards import Manifest
from pneumo.tracking import Artifact


def describe_dataset(manifest: Manifest) -> Artifact:
    """The data as an artifact: the manifest, with the digest of every shard."""
    content = manifest.model_dump_json(indent=1).encode()
    return Artifact(
        name="dataset",
        type="dataset",
        files={"manifest.json": content},
        metadata={"digest": manifest.digest},
    )


def describe_weights(entry: CheckpointEntry, run_url: str, manifest: Manifest) -> Artifact:
    """A checkpoint as an artifact: its record. The weights themselves stay in the run's folder."""
    record = {
        "run": run_url.rsplit("/", 1)[-1],
        "checkpoint": entry.name,
        "epoch": entry.epoch,
        "val_auroc": entry.val_auroc,
        "sha256": entry.sha256,
        "dataset": manifest.digest,
    }
    return Artifact(
        name="model",
        type="model",
        files={"checkpoint.json": json.dumps(record, indent=1).encode()},
        aliases=["best"],
        metadata=record,
    )
