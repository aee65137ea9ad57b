"""What W&B is told of a training is a value of its folder."""

import json
import shutil

import pytest

from pneumo.dataset.manifest import read_manifest
from pneumo.errors import TrackingError
from pneumo.reporting.tracking.tracked_run import make_run_id, renew_identity
from pneumo.reporting.tracking.training_run import read_training
from tests import present
from tests.pneumo.reporting.tracking.run_folders import write_training


@pytest.fixture(scope="module")
def store(tiny_store):
    return tiny_store()


def test_a_folder_says_it_all(tmp_path, store):
    run = write_training(tmp_path / "train", store, train__lr=0.5)
    found, manifest = present(read_training(str(run))), read_manifest(store)
    assert found.id == found.name == found.group == make_run_id(str(run))
    assert (found.job_type, found.tracking.project) == ("train", "pneumo")
    assert found.full_config["train"]["lr"] == 0.5
    assert found.config["dataset_digest"] == manifest.digest
    assert [one["name"] for one in found.full_config["inputs"]] == [
        f"dataset-{manifest.digest[:12]}"
    ]
    assert found.history[2] == {
        "epoch": 3,
        "train/loss": 1 / 3,
        "val/auroc": 0.7,
        "train/lr": 0.1,
        "perf/images_per_s": 30.0,
    }
    (model,) = found.outputs
    assert (model.name, list(model.aliases)) == (f"model-{found.name}", ["best"])
    assert model.metadata["checkpoint"] == "epoch-0002.pt"
    assert found.is_finished
    assert found == read_training(str(run))


def test_the_summary_is_of_the_epoch_that_is_scored_and_of_the_last_speed(tmp_path, store):
    found = present(read_training(str(write_training(tmp_path / "run", store))))
    summary = found.summary
    assert summary["val/auroc"] == 0.9
    assert summary["train/loss"] == 0.5
    assert summary["train/best_epoch"] == 2
    assert summary["perf/images_per_s"] == 30.0


def test_a_training_that_was_interrupted_is_not_finished_and_has_no_best_model(tmp_path, store):
    found = present(read_training(str(write_training(tmp_path / "run", store, finished=False))))
    assert not found.is_finished
    assert found.outputs == []
    assert found.inputs


def test_before_the_first_checkpoint_there_is_nothing_to_tell(tmp_path, store):
    run = write_training(tmp_path / "run", store)
    shutil.rmtree(run / "checkpoints")
    assert read_training(str(run)) is None
    assert read_training(str(tmp_path / "nowhere")) is None


def test_runs_of_one_name_do_not_meet(tmp_path, store):
    """Nor does a training under a URL that was used before."""
    runs = [write_training(tmp_path / folder / "train", store) for folder in ("A", "B")]
    names = {make_run_id(str(run)) for run in runs}
    assert len(names) == 2
    assert all(name.startswith("train-") for name in names)
    assert len({present(read_training(str(run))).outputs[0].name for run in runs}) == 2
    shutil.rmtree(runs[0])
    names.add(make_run_id(str(write_training(runs[0], store))))
    renew_identity(str(runs[1]))
    names.add(make_run_id(str(runs[1])))
    assert len(names) == 4
    write_training(runs[1], store, epochs=5)  # the same command goes on
    assert make_run_id(str(runs[1])) in names


@pytest.mark.parametrize("run", ["a run/of: mine", "ünïcode", "x" * 250, "demo-20261125"])
def test_any_name_of_a_run_is_one_that_wandb_takes(run):
    import wandb

    name = make_run_id(f"memory://none/{run}")
    assert len(name) < 100
    assert wandb.Artifact(f"evaluation-{name}", type="evaluation").name == f"evaluation-{name}"


def test_a_run_of_an_older_version_has_no_data_set(tmp_path, store):
    run = write_training(tmp_path / "run", store)
    shutil.rmtree(run / "tracking")
    found = present(read_training(str(run)))
    assert found.inputs == []
    assert found.outputs[0].metadata["dataset"] is None
    saved = json.loads((run / "config.json").read_text())
    saved["tracking"]["image_pixels"] = 96  # a setting that was removed
    (run / "config.json").write_text(json.dumps(saved))
    assert read_training(str(run)) == found
    (run / "config.json").write_text('{"no": "setting"}')
    with pytest.raises(TrackingError, match="not of this version"):
        read_training(str(run))


def test_the_group_of_the_settings_is_kept(tmp_path, store):
    run = write_training(tmp_path / "run", store, tracking__group="mine")
    assert present(read_training(str(run))).group == "mine"
