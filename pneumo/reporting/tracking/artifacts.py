"""What was made of what, as W&B artifacts: data set -> model -> evaluation.

A record of each goes into an artifact whose content is a digest, not the thing itself: shards and
weights stay where they are, and equal ones are one version. Each store and each run has names of
its own, so that `latest` and `best` speak of it alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pneumo.dataset.manifest import Manifest
from pneumo.reporting.tracking import Artifact
from pneumo.training.checkpoints import CheckpointEntry

_MAX_NAME = 128


def describe_dataset(manifest: Manifest) -> Artifact:
    """The data as an artifact: the manifest, with the digest of every shard."""
    content = manifest.model_dump_json(indent=1).encode()
    return Artifact(
        name=f"dataset-{manifest.digest[:12]}",
        type="dataset",
        files={"manifest.json": content},
        metadata={"digest": manifest.digest},
    )


def describe_weights(
    entry: CheckpointEntry, run_url: str, manifest: Manifest, aliases: Sequence[str] = ()
) -> Artifact:
    """A checkpoint as an artifact: its record. The weights themselves stay in the run's folder."""
    run = run_url.rsplit("/", 1)[-1]
    record = {
        "run": run,
        "checkpoint": entry.name,
        "epoch": entry.epoch,
        "val_auroc": entry.val_auroc,
        "sha256": entry.sha256,
        "dataset": manifest.digest,
    }
    return Artifact(
        name=_name("model", run),
        type="model",
        files={"checkpoint.json": json.dumps(record, indent=1).encode()},
        aliases=aliases,
        metadata=record,
    )


def describe_results(run: str, files: Mapping[str, Path | bytes]) -> Artifact:
    """What an evaluation of the run has found, as an artifact."""
    return Artifact(name=_name("evaluation", run), type="evaluation", files=files)


def _name(kind: str, run: str) -> str:
    """`model-<run>`, of the letters that W&B takes."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{kind}-{run}")[:_MAX_NAME]
