"""What a checkpoint holds comes back; what the index does not name does not count."""

import dataclasses
import hashlib
import io
import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pneumo.config import Config, TrainConfig
from pneumo.errors import CheckpointError, ContentError, RunError
from pneumo.training.checkpoint_content import copy_to_cpu
from pneumo.training.checkpoints import (
    Checkpoint,
    CheckpointEntry,
    CheckpointIndex,
    claim_run,
    find_index,
    find_weights,
    load_checkpoint,
    load_newest,
    read_index,
    save_checkpoint,
)
from pneumo.version import describe_code
from tests.examples import examples


def make_checkpoint(epoch: int = 1, auroc: float | None = 0.7, **changes: Any) -> Checkpoint:
    plain = Checkpoint(
        model={"weight": torch.full((2, 2), float(epoch)), "count": torch.tensor(epoch)},
        optimizer={"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        epoch=epoch,
        config=Config(seed=3, train=TrainConfig(lr=0.25)),
        manifest_digest="a" * 64,
        image_size=96,
        mean=0.48,
        std=0.23,
        history=({"val/auroc": 0.5, "lr": None}, {"val/auroc": auroc})[-epoch:],
        initialisation="random",
        code_version=describe_code(),
    )
    return dataclasses.replace(plain, **changes)


def save(run_url: str, *aurocs: float | None, keep_last: int = 2) -> str:
    """Checkpoints of so many epochs, written by one attempt; its id."""
    attempt = claim_run(run_url)
    for epoch, auroc in enumerate(aurocs, 1):
        save_checkpoint(
            run_url,
            make_checkpoint(epoch, auroc),
            attempt=attempt,
            keep_last=keep_last,
            finished=epoch == len(aurocs),
        )
    return attempt


def file_of(run_url: str, number: int = -1) -> Path:
    """Where a checkpoint of the index lies, by default the newest."""
    return Path(run_url) / "checkpoints" / read_index(run_url).entries[number].name


def replace_file(run_url: str, content: Any) -> CheckpointEntry:
    """Put something else in the newest checkpoint's place, with its digest in the index."""
    folder = Path(run_url) / "checkpoints"
    index = json.loads((folder / "index.json").read_text())
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = content if isinstance(content, bytes) else buffer.getvalue()
    (folder / index["entries"][-1]["name"]).write_bytes(data)
    index["entries"][-1]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))
    return read_index(run_url).latest


def plain_content(run_url: str) -> dict[str, Any]:
    name = read_index(run_url).latest.name
    content: dict[str, Any] = torch.load(Path(run_url) / "checkpoints" / name, weights_only=True)
    return content


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("has_files_in_memory", [True, False])
def test_all_that_was_saved_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_files_in_memory: bool
) -> None:
    if not has_files_in_memory:  # as on macOS
        monkeypatch.delattr(os, "memfd_create", raising=False)
    saved, attempt = make_checkpoint(2), claim_run(str(tmp_path))
    save_checkpoint(str(tmp_path), saved, attempt=attempt, keep_last=1, finished=True)
    index = read_index(str(tmp_path))
    assert index.finished
    assert (index.latest.epoch, index.latest.val_auroc) == (2, 0.7)
    loaded = load_checkpoint(str(tmp_path), index.latest)
    for field in dataclasses.fields(Checkpoint):
        if field.name != "model":
            assert getattr(loaded, field.name) == getattr(saved, field.name), field.name
    assert loaded.model.keys() == saved.model.keys()
    for name, tensor in saved.model.items():
        assert torch.equal(loaded.model[name], tensor)
        assert loaded.model[name].dtype == tensor.dtype


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = make_checkpoint(model=model.state_dict(), optimizer=optimizer.state_dict())
    attempt = claim_run(str(tmp_path))
    save_checkpoint(str(tmp_path), saved, attempt=attempt, keep_last=1, finished=False)
    loaded = load_checkpoint(str(tmp_path), read_index(str(tmp_path)).latest)
    again = nn.Linear(3, 1)
    again.load_state_dict(loaded.model)
    again_optimizer = torch.optim.Adam(again.parameters(), lr=9.0)
    again_optimizer.load_state_dict(loaded.optimizer)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, again_optimizer, seed)
    assert torch.equal(again.weight, model.weight)
    assert torch.equal(again.bias, model.bias)


def test_what_computes_is_described() -> None:
    found = make_checkpoint().versions
    assert found["torch"] == torch.__version__
    assert {"python", "torchvision", "ray"} <= set(found)
    assert ("cuda" in found) is (torch.version.cuda is not None)


# --- the index ------------------------------------------------------------------------------------


def test_nothing_trained_is_no_checkpoint(tmp_path: Path) -> None:
    assert find_index(str(tmp_path)) is None
    with pytest.raises(RunError, match=rf"^{tmp_path}: no checkpoint in it; train first"):
        read_index(str(tmp_path))


def test_a_file_that_the_index_does_not_name_is_not_there(tmp_path: Path) -> None:
    run_url = str(tmp_path)
    save(run_url, 0.6, 0.7)
    newest = file_of(run_url)
    newest.with_name("epoch-0003-01234567.pt").write_bytes(newest.read_bytes())
    assert read_index(run_url).latest.epoch == 2


def test_checkpoints_without_an_index_are_not_taken_for_a_fresh_run(tmp_path: Path) -> None:
    save(str(tmp_path), 0.6)
    (tmp_path / "checkpoints" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: missing, .* restore it, or give anot"):
        find_index(str(tmp_path))


def test_a_reader_never_meets_an_index_whose_file_is_not_whole(tmp_path: Path) -> None:
    run_url, stop, read = str(tmp_path), threading.Event(), []

    def poll() -> None:
        while not stop.is_set():
            index = find_index(run_url)
            if index is not None:
                read.append(load_checkpoint(run_url, index.latest).epoch)

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            poll()
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=guarded)
    reader.start()
    big, attempt = {"weight": torch.zeros(500_000)}, claim_run(run_url)
    for epoch in range(1, 15):
        checkpoint = make_checkpoint(epoch, model=big)
        save_checkpoint(run_url, checkpoint, attempt=attempt, keep_last=100, finished=False)
    stop.set()
    reader.join()
    assert failures == []
    assert read == sorted(read)
    assert read


aurocs = st.none() | st.sampled_from([0.5, 0.6, 0.7, 0.8])


@examples(25)
@given(st.lists(aurocs, min_size=1, max_size=6), st.integers(1, 3))
def test_the_last_and_the_best_are_kept_and_nothing_else(
    values: list[float | None], keep_last: int
) -> None:
    run_url = f"memory://{os.urandom(8).hex()}"
    save(run_url, *values, keep_last=keep_last)
    index = read_index(run_url)
    scores = [-1.0 if value is None else value for value in values]
    best = scores.index(max(scores)) + 1 if max(scores) >= 0 else len(values)
    expected = sorted({best, *range(max(1, len(values) - keep_last + 1), len(values) + 1)})
    assert [entry.epoch for entry in index.entries] == expected
    assert index.latest.epoch == len(values)
    assert index.best.epoch == best
    for entry in index.entries:
        assert load_checkpoint(run_url, entry).epoch == entry.epoch


def test_files_of_dropped_checkpoints_are_deleted(tmp_path: Path) -> None:
    attempt = save(str(tmp_path), 0.6, 0.8, 0.7, 0.7, 0.7)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    files = {f"epoch-000{epoch}-{attempt}.pt" for epoch in (2, 4, 5)}
    assert names == {"index.json", f"claim-{attempt}.json", *files}


def test_an_index_that_names_a_file_elsewhere_deletes_nothing_there(tmp_path: Path) -> None:
    victim, run = tmp_path / "victim.pt", tmp_path / "run"
    victim.write_bytes(b"somebody's")
    attempt = save(str(run), 0.5)
    index = run / "checkpoints" / "index.json"
    content = json.loads(index.read_text())
    content["entries"].insert(0, {**content["entries"][0], "name": "../../victim.pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(ContentError, match="refused a name"):
        save_checkpoint(
            str(run), make_checkpoint(2, 0.9), attempt=attempt, keep_last=1, finished=False
        )
    assert victim.read_bytes() == b"somebody's"


def test_an_epoch_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    run_url = str(tmp_path)
    save(run_url, 0.6, 0.7, 0.8, keep_last=3)
    index = read_index(run_url)
    again = claim_run(run_url, index.until(index.entries[0]))
    save_checkpoint(run_url, make_checkpoint(2, 0.9), attempt=again, keep_last=3, finished=False)
    index = read_index(run_url)
    assert [(entry.epoch, entry.val_auroc) for entry in index.entries] == [(1, 0.6), (2, 0.9)]
    assert not index.finished
    assert len(list((tmp_path / "checkpoints").glob("epoch-*"))) == 2


def test_the_best_of_undefined_scores_is_the_newest() -> None:
    entries = tuple(
        CheckpointEntry(name=f"{epoch}", epoch=epoch, val_auroc=None, sha256="")
        for epoch in (1, 2, 3)
    )
    assert CheckpointIndex(entries=entries).best.epoch == 3


# --- one writer -----------------------------------------------------------------------------------


def read_folder(run_url: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (Path(run_url) / "checkpoints").iterdir()}


@pytest.mark.parametrize("late_epoch", [2, 4, 9])
def test_a_late_writer_of_a_lost_attempt_changes_nothing(tmp_path: Path, late_epoch: int) -> None:
    run_url = str(tmp_path)
    lost = save(run_url, 0.6)
    attempt = claim_run(run_url, read_index(run_url))
    for epoch, auroc in ((3, 0.7), (4, 0.9)):
        save_checkpoint(
            run_url,
            make_checkpoint(epoch, auroc, history=({"val/auroc": auroc},)),
            attempt=attempt,
            keep_last=2,
            finished=epoch == 4,
        )
    before = read_folder(run_url)
    late = make_checkpoint(late_epoch, 0.99, history=({"val/auroc": 0.99},))
    message = rf"^{run_url}: another attempt has claimed this run, so this one \({lost}\) writes"
    with pytest.raises(RunError, match=message):
        save_checkpoint(run_url, late, attempt=lost, keep_last=2, finished=False)
    assert read_folder(run_url) == before
    index = read_index(run_url)
    assert index.finished
    assert [entry.epoch for entry in index.entries] == [3, 4]


class _Overtaken:
    """Takes so long to pickle that another attempt begins meanwhile."""

    def __init__(self, run_url: str) -> None:
        self.run_url = run_url

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        claim_run(self.run_url, read_index(self.run_url))
        return dict, ()


def test_a_writer_that_loses_the_run_while_it_writes_leaves_the_index_alone(
    tmp_path: Path,
) -> None:
    run_url = str(tmp_path)
    attempt = save(run_url, 0.6)
    slow = make_checkpoint(2, optimizer={"state": _Overtaken(run_url)})
    with pytest.raises(RunError, match="another attempt has claimed this run"):
        save_checkpoint(run_url, slow, attempt=attempt, keep_last=2, finished=False)
    index = read_index(run_url)
    assert [entry.epoch for entry in index.entries] == [1]
    assert index.attempt != attempt
    assert (tmp_path / "checkpoints" / f"epoch-0002-{attempt}.pt").exists(), "it did get so far"


def test_who_takes_a_run_over_removes_what_the_index_does_not_name(tmp_path: Path) -> None:
    run_url, folder = str(tmp_path), tmp_path / "checkpoints"
    lost = save(run_url, 0.6, 0.7)
    kept = {path.name for path in folder.iterdir()}
    (folder / "epoch-0003-01234567.pt").write_bytes(b"written, and killed before the index was")
    (folder / ".partial-abc").write_bytes(b"half")
    (folder / "notes.txt").write_text("a person's")
    new = claim_run(run_url, read_index(run_url))
    kept = kept - {f"claim-{lost}.json"} | {f"claim-{new}.json", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == kept
    assert [entry.epoch for entry in read_index(run_url).entries] == [1, 2]


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_lost_attempt_writes_late_changes_nothing(finished: bool, tmp_path: Path) -> None:
    """Its requests may be on their way while another attempt claims the run."""
    run_url, folder = str(tmp_path), tmp_path / "checkpoints"
    lost = save(run_url, 0.6, 0.8)
    late = {path: path.read_bytes() for path in folder.glob("*.json")}
    new = claim_run(run_url, read_index(run_url))
    write = partial(save_checkpoint, attempt=new, keep_last=2, finished=finished)
    write(run_url, make_checkpoint(3))
    before = read_index(run_url)
    for path, content in late.items():
        path.write_bytes(content)
    assert read_index(run_url) == before
    assert before.latest.epoch == 3
    with pytest.raises(RunError, match="another attempt has claimed this run"):
        save_checkpoint(run_url, make_checkpoint(3), attempt=lost, keep_last=2, finished=False)
    write(run_url, make_checkpoint(4))
    index = read_index(run_url)
    assert (index.attempt, index.latest.epoch, index.finished) == (new, 4, finished)
    assert CheckpointIndex.model_validate_json((folder / "index.json").read_text()) == index
    for entry in index.entries:
        assert load_checkpoint(run_url, entry).epoch == entry.epoch
    claim_run(run_url, index)
    assert len(list(folder.glob("claim-*.json"))) == 1


# --- within an epoch, of averages, while training goes on -----------------------------------------


def test_a_place_within_an_epoch_comes_after_the_epoch_and_is_never_the_best(
    tmp_path: Path,
) -> None:
    run_url = str(tmp_path)
    attempt = save(run_url, 0.6)
    for step in (5, 10):
        inside = make_checkpoint(1, 0.9, step=step, epoch_loss=2.5)
        save_checkpoint(run_url, inside, attempt=attempt, keep_last=2, finished=False)
    index = read_index(run_url)
    assert [(e.epoch, e.step) for e in index.entries] == [(1, 0), (1, 5), (1, 10)]
    assert index.latest.name == f"epoch-0001-step-000010-{attempt}.pt"
    assert index.best.step == 0
    loaded = load_checkpoint(run_url, index.latest)
    assert (loaded.step, loaded.epoch_loss) == (10, 2.5)
    after = make_checkpoint(2, 0.5)
    save_checkpoint(run_url, after, attempt=attempt, keep_last=1, finished=False)
    assert [(e.epoch, e.step) for e in read_index(run_url).entries] == [(1, 0), (2, 0)]


def test_the_average_is_what_is_scored_where_there_is_one(tmp_path: Path) -> None:
    run_url, attempt = str(tmp_path), claim_run(str(tmp_path))
    for epoch, (raw, averaged) in enumerate([(0.9, 0.6), (0.5, 0.8)], 1):
        checkpoint = make_checkpoint(
            epoch,
            history=({"val/auroc": raw, "val/ema_auroc": averaged},),
            ema={"weight": torch.zeros(2, 2)},
        )
        save_checkpoint(run_url, checkpoint, attempt=attempt, keep_last=2, finished=True)
    best = read_index(run_url).best
    assert (best.epoch, best.val_auroc, best.weights) == (2, 0.8, "ema")
    loaded = load_checkpoint(run_url, best)
    assert loaded.weights == "ema"
    assert torch.equal(loaded.scored_model["weight"], torch.zeros(2, 2))
    plain = make_checkpoint()
    assert plain.weights == "raw"
    assert plain.scored_model is plain.model


def test_the_weights_of_a_run_are_those_of_its_best_checkpoint(tmp_path: Path) -> None:
    run, empty = str(tmp_path / "run"), str(tmp_path / "empty")
    save(run, 0.6, 0.9, 0.7)

    def find(weights: str) -> str:
        return find_weights(Config.model_validate({"model": {"weights": weights}})).model.weights

    assert find(run) == str(file_of(run, 0))
    assert read_index(run).entries[0].epoch == 2
    for other in ("imagenet", "random", str(file_of(run))):
        assert find(other) == other
    searched = {"space": {"model.weights": ["choice", "imagenet", run], "train.lr": 1.0}}
    before = Config.model_validate({"tune": searched})
    space = find_weights(before).tune.space
    assert space["model.weights"].values == ("imagenet", str(file_of(run, 0)))
    assert space["train.lr"] == before.tune.space["train.lr"]
    claim_run(empty)
    with pytest.raises(RunError, match="no checkpoint in it; train first"):
        find(empty)


def test_an_early_end_is_said_in_the_index(tmp_path: Path) -> None:
    save_checkpoint(
        str(tmp_path),
        make_checkpoint(1),
        attempt=claim_run(str(tmp_path)),
        keep_last=1,
        finished=True,
        stopped_early=True,
    )
    assert read_index(str(tmp_path)).stopped_early


def test_the_one_before_a_damaged_checkpoint_is_taken_and_it_is_said(tmp_path: Path) -> None:
    run_url, told = str(tmp_path), list[str]()
    save(run_url, 0.6, 0.5, 0.4, keep_last=3)
    first, second, third = (file_of(run_url, number) for number in range(3))
    third.write_bytes(third.read_bytes()[:99])
    second.unlink()
    entry, loaded = load_newest(run_url, read_index(run_url), told.append)
    assert entry.epoch == loaded.epoch == 1
    assert f"{third.name}: its SHA-256 differs from the index" in told[0]
    assert f"{second.name}: listed in the index, but missing; using the one before" in told[1]
    first.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"epoch-0001-\w{14}\.pt: its SHA-256 differs from the index"
    ):
        load_newest(run_url, read_index(run_url))


def test_a_snapshot_does_not_change_with_the_model() -> None:
    model = nn.Linear(2, 2)
    state = {"groups": [{"lr": 0.1}], "weights": model.state_dict()}
    snapshot = copy_to_cpu(state)
    before = snapshot["weights"]["weight"].clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(snapshot["weights"]["weight"], before)
    assert snapshot["groups"] == [{"lr": 0.1}]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '{"entries": [{"name": "a"}]}'])
def test_an_unreadable_index_is_refused(tmp_path: Path, text: str) -> None:
    save(str(tmp_path), 0.6)
    (tmp_path / "checkpoints" / "index.json").write_text(text)
    message = r"index\.json: not an index of checkpoints of this version; .* give another --run"
    with pytest.raises(CheckpointError, match=message):
        read_index(str(tmp_path))


def test_a_newer_index_is_refused(tmp_path: Path) -> None:
    save(str(tmp_path), 0.6)
    path = tmp_path / "checkpoints" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 3}))
    with pytest.raises(CheckpointError, match=r"index\.json: schema 3, this version reads 2"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.999])
def test_a_changed_byte_is_refused(tmp_path: Path, place: float) -> None:
    save(str(tmp_path), 0.6)
    path = file_of(str(tmp_path))
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"epoch-0001-\w{14}\.pt: its SHA-256 differs from the index"
    ):
        load_checkpoint(str(tmp_path), read_index(str(tmp_path)).latest)


def test_a_cut_or_missing_file_is_refused(tmp_path: Path) -> None:
    save(str(tmp_path), 0.6)
    path = file_of(str(tmp_path))
    path.write_bytes(path.read_bytes()[:-1])
    entry = read_index(str(tmp_path)).latest
    with pytest.raises(
        CheckpointError, match=r"epoch-0001-\w{14}\.pt: its SHA-256 differs from the index"
    ):
        load_checkpoint(str(tmp_path), entry)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"epoch-0001-\w{14}\.pt: listed in the index, but missing"
    ):
        load_checkpoint(str(tmp_path), entry)


class _Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    run_url, trace = str(tmp_path), tmp_path / "ran"
    save(run_url, 0.6)
    entry = replace_file(run_url, plain_content(run_url) | {"code_version": _Malice(trace)})
    with pytest.raises(CheckpointError, match=r"epoch-0001-\w{14}\.pt: not a readable checkpoint"):
        load_checkpoint(run_url, entry)
    assert not trace.exists()
    torch.load(tmp_path / "checkpoints" / entry.name, weights_only=False)
    assert trace.exists(), "the file would have run code"


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    save(str(tmp_path), 0.6)
    with pytest.raises(CheckpointError, match=r"epoch-0001-\w{14}\.pt: not a readable checkpoint"):
        load_checkpoint(str(tmp_path), replace_file(str(tmp_path), content))


@pytest.mark.parametrize("version", [0, 1, 3, None, "2"])
def test_a_file_of_another_schema_is_refused(tmp_path: Path, version: object) -> None:
    run_url = str(tmp_path)
    save(run_url, 0.6)
    entry = replace_file(run_url, plain_content(run_url) | {"schema_version": version})
    with pytest.raises(CheckpointError, match=r"epoch-0001-\w{14}\.pt: of another schema than 2"):
        load_checkpoint(run_url, entry)
    with pytest.raises(CheckpointError, match=r"of another schema than 2"):
        load_checkpoint(run_url, replace_file(run_url, [1, 2]))


def test_settings_that_were_removed_since_do_not_matter(tmp_path: Path) -> None:
    run_url = str(tmp_path)
    save(run_url, 0.6)
    before, plain = load_checkpoint(run_url, read_index(run_url).latest), plain_content(run_url)
    plain["config"]["data"] |= {"readers": 4, "cache_dir": None}
    plain["config"]["train"] |= {"precision": "native", "momentum": 0.9}
    checkpoint = load_checkpoint(run_url, replace_file(run_url, plain))
    assert checkpoint.config == before.config


@pytest.mark.parametrize(
    "change", [{"config": {"train": {"new": 1}}}, {"config": None}, {"new_field": 1}]
)
def test_a_file_with_fields_of_another_version_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    run_url = str(tmp_path)
    save(run_url, 0.6)
    entry = replace_file(run_url, plain_content(run_url) | change)
    with pytest.raises(
        CheckpointError, match=r"epoch-0001-\w{14}\.pt: written by another version of "
    ):
        load_checkpoint(run_url, entry)
