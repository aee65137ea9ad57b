"""A real training on KubeRay, and what goes wrong under it within minutes."""

import pytest
import s3fs

from pneumo.training.checkpoints import CheckpointIndex
from tests.kubernetes.cluster import Team
from tests.kubernetes.trainings import epochs_of, make_training, wait_for_epoch
from tests.kubernetes.watching import begin, evict, name_of

pytestmark = pytest.mark.kubernetes


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("needs_bucket")
def test_a_training_whose_worker_is_sent_off_its_node_trains_nothing_twice(
    team: Team, store: str, files: s3fs.S3FileSystem
) -> None:
    """It goes on from a checkpoint of this moment, and leaves one when it is cancelled."""
    run = begin(team, make_training(team, store, "drained", 500))
    wait_for_epoch(run, 1)
    worker = name_of(team.pods(run.job_id, component="worker")[0])
    evict(team, worker)
    run.wait_for_note(f"pod {worker} was evicted (EvictionByEvictionAPI")
    run.wait_for_text("is draining: resuming with 2 workers after epoch")
    wait_for_epoch(run, max(epochs_of(run)))
    assert epochs_of(run) == list(range(1, max(epochs_of(run)) + 1))  # none trained twice
    assert team.target().cancel(run.job_id).exit_code == 130
    assert run.end().exit_code == 130
    said = "".join(run.text)
    assert "train: interrupted; writing a checkpoint" in said
    assert "no checkpoint" not in said
    index = files.cat_file(f"{team.bucket}/drained/checkpoints/index.json")
    assert CheckpointIndex.model_validate_json(index).latest.epoch >= max(epochs_of(run))
