"""Lineage as W&B artifacts: data set -> model -> evaluation.

An artifact has a record with digests, not the data: shards and weights stay where they are, and
equal ones are one version. Weights in an object store are referenced, so that who may read them
there can download them by the artifact; a local path is not sent. Each store and each run has
artifact names of its own, so that `latest` and `best` refer to it alone.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pneumo import storage
from pneumo.dataset.manifest import Manifest
from pneumo.reporting.tracking.media import Artifact
from pneumo.reporting.tracking.tracked_run import make_run_id
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


def record_checkpoint(run_url: str, entry: CheckpointEntry, dataset: str | None) -> dict[str, Any]:
    """The record of a run's checkpoint; `dataset` is the manifest's digest."""
    url = storage.join(run_url, "checkpoints", entry.name)
    return {
        "run": make_run_id(run_url),
        "checkpoint": entry.name,
        "epoch": entry.epoch,
        "val_auroc": entry.val_auroc,
        "sha256": entry.sha256,
        "dataset": dataset,
        "url": None if storage.is_local(url) else url,
    }


def describe_checkpoint(record: Mapping[str, Any], aliases: Sequence[str] = ()) -> Artifact:
    """A checkpoint as an artifact: its record, and where the weights are in an object store."""
    url = record.get("url")
    return Artifact(
        name=f"model-{record['run']}",
        type="model",
        files={"checkpoint.json": json.dumps(record, indent=1).encode()},
        # Without folders, as a download writes a file of this name.
        references={record["checkpoint"].rsplit("/", 1)[-1]: url} if url else {},
        aliases=aliases,
        metadata=record,
    )
