"""What was made of what, as W&B artifacts: data set -> model -> evaluation.

A record of each goes into an artifact whose content is a digest, not the thing itself: shards and
weights stay where they are, and equal ones are one version. Weights in an object store are
referenced, so whoever may read them there downloads them by the artifact, from W&B's registry too;
a path of one machine is nobody's business. Each store and each run has names of its own, so that
`latest` and `best` speak of it alone.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pneumo import storage
from pneumo.dataset.manifest import Manifest
from pneumo.reporting.tracking.media import Artifact
from pneumo.reporting.tracking.tracked_run import name_run
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


def record_weights(run_url: str, entry: CheckpointEntry, dataset: str | None) -> dict[str, Any]:
    """The record of a checkpoint of a run, trained on the data of this digest."""
    url = storage.join(run_url, "checkpoints", entry.name)
    return {
        "run": name_run(run_url),
        "checkpoint": entry.name,
        "epoch": entry.epoch,
        "val_auroc": entry.val_auroc,
        "sha256": entry.sha256,
        "dataset": dataset,
        "url": None if storage.is_local(url) else url,
    }


def describe_weights(record: Mapping[str, Any], aliases: Sequence[str] = ()) -> Artifact:
    """A checkpoint as an artifact: its record, and where the weights are in an object store."""
    url = record.get("url")
    return Artifact(
        name=f"model-{record['run']}",
        type="model",
        files={"checkpoint.json": json.dumps(record, indent=1).encode()},
        # A name alone: whoever downloads the artifact writes a file of it.
        references={record["checkpoint"].rsplit("/", 1)[-1]: url} if url else {},
        aliases=aliases,
        metadata=record,
    )
