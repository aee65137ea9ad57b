"""Data set -> model -> evaluation, each under a name of its own."""

import json

from pneumo.dataset.manifest import read_manifest
from pneumo.reporting.tracking.artifacts import (
    describe_checkpoint,
    describe_dataset,
    record_checkpoint,
)
from pneumo.reporting.tracking.wandb_media import to_wandb_artifact
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
    first, second = (record_checkpoint(f"/runs/{name}/train", ENTRY, "digest") for name in "AB")
    used, made = describe_checkpoint(first), describe_checkpoint(second, ["best"])
    assert used.name.startswith("model-train-")
    assert made.name.startswith("model-train-")
    assert used.name != made.name
    assert (list(used.aliases), list(made.aliases)) == ([], ["best"])
    assert used.references == {}
    assert "/runs" not in str(used)
    assert json.loads(used.files["checkpoint.json"]) == used.metadata
    assert used.metadata["sha256"] == ENTRY.sha256
    assert used.metadata["dataset"] == "digest"


def test_weights_in_an_object_store_are_referenced(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    url = "s3://bucket/run/checkpoints/epoch-0003.pt"
    record = {"run": "run-12345678", "checkpoint": ENTRY.name, "sha256": ENTRY.sha256, "url": url}
    packed = to_wandb_artifact(describe_checkpoint(record, ["best"]))
    entries = packed.manifest.entries
    assert set(entries) == {"checkpoint.json", ENTRY.name}
    assert entries[ENTRY.name].ref == url


def test_a_record_of_a_name_that_leads_out_names_a_file_of_the_artifact():
    url = "s3://bucket/run/checkpoints/epoch-0003.pt"
    record = {"run": "run-12345678", "checkpoint": "../../up.pt", "sha256": "", "url": url}
    assert describe_checkpoint(record).references == {"up.pt": url}
