"""All ranks go on from what rank 0 chose, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pneumo.config import Config
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import RunError
from pneumo.loading.sample_order import World
from pneumo.training.checkpoints import Checkpoint, claim_run, read_index, save_checkpoint
from pneumo.training.resuming import claim_and_resume
from tests.ranks import run_ranks

StoreMaker = Callable[..., str]


def write_run(run_url: str, store_url: str, *, epochs: int, finished: bool = False) -> None:
    attempt, manifest = claim_run(run_url), read_manifest(store_url)
    for epoch in range(1, epochs + 1):
        checkpoint = Checkpoint(
            model={},
            optimizer={},
            epoch=epoch,
            config=Config(),
            manifest_digest=manifest.digest,
            image_size=32,
            mean=0.5,
            std=0.2,
            history=({"val/auroc": 0.5},),
            initialisation="random",
            code_version="0",
        )
        save_checkpoint(
            run_url, checkpoint, attempt=attempt, keep_last=2, finished=finished and epoch == epochs
        )


_RANK = """
from pneumo.config import Config
from pneumo.errors import PneumoError
from pneumo.training.resuming import claim_and_resume
from pneumo.dataset.manifest import read_manifest

(store_url,) = arguments

def begin(rank_0_sees, others_see):
    run_url = folder / (others_see if rank else rank_0_sees)
    try:
        found = claim_and_resume(Config(), read_manifest(store_url), str(run_url), world)
    except PneumoError as error:
        return f"{type(error).__name__}: {error}"
    return [found.attempt, found.checkpoint and found.checkpoint.epoch]

told = [begin("run", "stale"), begin("run", "empty"), begin("finished", "run"), begin("new", "run")]
(folder / f"told-{rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_ranks_go_on_from_what_rank_0_chose_or_not_at_all(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    store_url, run = tiny_store(), tmp_path / "run"
    write_run(str(run), store_url, epochs=2)
    # A rank to which the folder still looks as it did an epoch ago, and one that sees no file.
    stale = Path(shutil.copytree(run, tmp_path / "stale"))
    index = read_index(str(stale))
    (stale / "checkpoints" / "index.json").write_text(
        index.until(index.entries[0]).model_dump_json()
    )
    (tmp_path / "empty").mkdir()
    write_run(str(tmp_path / "finished"), store_url, epochs=1, finished=True)
    run_ranks(_RANK, tmp_path, 2, store_url)
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert second[0] == first[0]
    assert first[0][1] == 2
    assert first[1][1] == 2
    assert second[1].startswith("CheckpointError: ")
    assert second[1].endswith("listed in the index, but missing")
    # What rank 0 refuses no rank begins, and none is left waiting.
    assert second[2] == first[2]
    assert "holds a finished run of 1 epochs" in first[2]
    assert second[3] == first[3]
    assert first[3][1] is None


def test_what_is_refused_does_not_take_the_run_from_its_owner(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    store_url, run_url = tiny_store(), str(tmp_path)
    write_run(run_url, store_url, epochs=2)
    owner = read_index(run_url).attempt
    with pytest.raises(RunError, match="was started with other settings in seed"):
        claim_and_resume(Config(seed=9), read_manifest(store_url), run_url, World())
    assert read_index(run_url).attempt == owner


def test_what_comes_after_the_newest_whole_checkpoint_is_dropped(
    tiny_store: StoreMaker, tmp_path: Path
) -> None:
    store_url, run_url, told = tiny_store(), str(tmp_path), list[str]()
    write_run(run_url, store_url, epochs=2)
    damaged = tmp_path / "checkpoints" / read_index(run_url).latest.name
    damaged.write_bytes(damaged.read_bytes()[:99])
    found = claim_and_resume(Config(), read_manifest(store_url), run_url, World(), told.append)
    assert found.checkpoint is not None
    assert found.checkpoint.epoch == 1
    index = read_index(run_url)
    assert [entry.epoch for entry in index.entries] == [1]
    assert index.attempt == found.attempt
    assert not damaged.exists()
    assert damaged.name in told[0]
