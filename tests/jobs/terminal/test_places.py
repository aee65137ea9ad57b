"""Missing and taken places are told before a job begins."""

import json
from pathlib import Path

import pytest

from jobs.terminal.places import check_places
from pneumo.command_line import parse_command_line
from pneumo.errors import ConfigError, RunError, SourceError, StoreError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store, a run that is being trained, one that is evaluated, a search that is under way, and
    a folder of files."""
    for name in ("store/manifest.json", "run/checkpoints/index.json", "files/a.dcm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    write_index(tmp_path / "judged", finished=True)
    (tmp_path / "judged" / "predictions.parquet").write_bytes(b"")
    for name in ("judged/metrics.json", "judged/external/metrics.json", "search/search.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def write_index(run: Path, *, finished: bool) -> None:
    (run / "checkpoints").mkdir(parents=True)
    index = {"finished": finished, "entries": [{"epoch": 1}, {"epoch": 7}]}
    (run / "checkpoints" / "index.json").write_text(json.dumps(index))


def check(folder: Path, job: str, flags: str) -> None:
    """Check the places of a command line; `@` stands for the folder."""
    check_places(parse_command_line(job, flags.replace("@", f"{folder}/").split(), {}))


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("prepare", "--source @files --store @new"),
        ("train", "--store @store"),
        ("train", "--store @store --run @run"),
        ("train", "--store @store --run @new --model.weights @files/a.dcm"),
        ("tune", "--store @store --run @new"),
        ("evaluate", "--store @store --run @run --members @judged --compare-with @judged"),
        ("evaluate", "--store @store --run @judged --overwrite"),
        ("evaluate", "--store @store --run @judged --external @store --overwrite"),
        ("tune", "--store @store --run @search"),
        ("predict", "--source @files --run @judged --output @new --members @run"),
    ],
)
def test_places_that_serve_pass(folder: Path, job: str, flags: str) -> None:
    check(folder, job, flags)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("job", "flags", "error", "message"),
    [
        ("prepare", "--source @new --store @store", SourceError, "new: no such folder"),
        (
            "prepare",
            "--source @files --store @new --split.list @no.csv",
            SourceError,
            r"split\.list: .*no\.csv' is no file",
        ),
        ("train", "--store @files", StoreError, r"files: no manifest\.json, so nothing is prep"),
        (
            "train",
            "--store @store --run @judged",
            RunError,
            "judged: holds a finished run of 7 epochs; give another --run",
        ),
        (
            "tune",
            "--store @store --model.weights @no.pt",
            ConfigError,
            r"model\.weights: .*no\.pt' is no file; give 'imagenet', 'random', a run, or the path",
        ),
        ("evaluate", "--store @store --run @files", RunError, "files: no checkpoint in it"),
        ("evaluate", "--store @store --run @run --members @run,@new", RunError, "new: no checkp"),
        (
            "evaluate",
            "--store @store --run @run --compare-with @run",
            RunError,
            "run: is not evaluated; evaluate it first",
        ),
        ("evaluate", "--store @store --run @judged", RunError, "judged: is evaluated already"),
        ("predict", "--source @new --run @run --output @out", SourceError, "new: no file in it"),
        ("train", "--store @store --run @store", RunError, "store: is a store; give another"),
        ("train", "--store @store --run @search", RunError, "search: is a search; give another"),
        ("tune", "--store @store --run @run", RunError, "run: is a run; give another folder"),
        ("prepare", "--source @files --store @run", RunError, "run: is a run; give another"),
        (
            "predict",
            "--source @files --run @run --output @run --overwrite",
            RunError,
            "--output .*run: is a run; give another folder for the predictions",
        ),
        ("export", "--run @judged --output @judged", RunError, "judged: is a run; give another"),
        (
            "predict",
            "--source @files --run @run --output @files/a.dcm/out",
            ConfigError,
            r"a\.dcm cannot be written to, or is no folder",
        ),
        (
            "evaluate",
            "--store @store --run @judged --external @store",
            RunError,
            "judged: is evaluated on other sets already, .* name all sets and --overwrite",
        ),
    ],
)
def test_a_place_that_does_not_serve_is_named(
    folder: Path, job: str, flags: str, error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(folder, job, flags)


@pytest.mark.parametrize(
    ("job", "flags", "marker", "message"),
    [
        ("tune", "--store @store --run @out", "best.toml", "out: holds a finished search; give"),
        (
            "predict",
            "--source @files --run @run --output @out",
            "summary.json",
            "out: holds predictions already; give another --output, or --overwrite",
        ),
    ],
)
def test_a_place_that_is_taken_is_named(
    folder: Path, job: str, flags: str, marker: str, message: str
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "predictions.csv").write_text("")  # of a prediction killed before its end
    (folder / "out" / "unfinished.txt").write_text("")
    check(folder, job, flags)
    (folder / "out" / marker).write_text("")
    with pytest.raises(RunError, match=message):
        check(folder, job, flags)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("predict --source @files --run @run --output @out", "overlays/scan.dcm"),
        ("predict --source @files --run @run --output @out", "predictions.csv"),
        ("export --run @judged --output @out", "README.md"),
    ],
)
def test_what_no_job_has_written_is_not_replaced(folder: Path, flags: str, name: str) -> None:
    job, flags = flags.split(" ", 1)
    path = folder / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("somebody's own")
    for overwrite in ("", " --overwrite"):
        with pytest.raises(RunError, match=f"{name.split('/')[0]} in it is not of an earlier job"):
            check(folder, job, flags + overwrite)
