"""Data set -> model -> evaluation, each under a name of its own."""

import json

from pneumo.dataset.manifest import read_manifest
from pneumo.reporting.tracking.artifacts import (
    describe_dataset,
    describe_weights,
    record_weights,
)
from pneumo.training.checkpoints import CheckpointEntry

ENTRY = CheckpointEntry(name="epoch-0003.pt", epoch=3, val_auroc=0.9, sha256="ab" * 32)


def test_two_stores_are_two_data_sets(tiny_store):
    first, second = (read_manifest(tiny_store(seed=seed)) for seed in (0, 1))
    artifacts = [describe_dataset(manifest) for manifest in (first, second, first)]
    assert artifacts[0] == artifacts[2]
    assert artifacts[0].name != artifacts[1].name
    content = json.loads(artifacts[0].files["manifest.json"])
    assert content["splits"]["train"]["shards"][0]["sha256"]


def test_two_runs_are_two_models_and_only_their_own_best_moves():
    used = describe_weights(record_weights(ENTRY, "one", "digest"))
    made = describe_weights(record_weights(ENTRY, "two", "digest"), ["best"])
    assert (used.name, list(used.aliases)) == ("model-one", [])
    assert (made.name, list(made.aliases)) == ("model-two", ["best"])
    assert json.loads(used.files["checkpoint.json"]) == used.metadata
    assert used.metadata["sha256"] == ENTRY.sha256
    assert used.metadata["dataset"] == "digest"
