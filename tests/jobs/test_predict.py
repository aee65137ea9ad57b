import csv
import json
import shutil
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs import evaluate, predict
from jobs.evaluation.ray_scoring import Scoring, WorkerSettings
from jobs.prediction import Task, predict_files, shorten_path
from jobs.terminal.places import WRITTEN
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.study_table import digest_pixels, read_studies
from pneumo.evaluation.predictions import Predictions
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import read_pictures
from pneumo.training.checkpoints import claim_run, load_checkpoint, read_index, save_checkpoint
from tests.conftest import DicomMaker
from tests.jobs.conftest import Prepared

QUICK = [
    *("--evaluate.min-patients", "1"),
    *("--evaluate.bootstrap-resamples", "100", "--tracking.mode", "disabled"),
    *("--evaluate.pictures", "2"),
]


@pytest.fixture(scope="module")
def ensemble(
    prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two runs, evaluated together as an ensemble of four checkpoints, each of three views; the
    second sees smaller pictures than are stored."""
    folder = tmp_path_factory.mktemp("ensemble")
    run, other = Path(shutil.copytree(trained, folder / "run")), folder / "other"
    attempt = claim_run(str(other))
    for entry in read_index(str(trained)).entries:
        smaller = replace(load_checkpoint(str(trained), entry), image_size=48)
        save_checkpoint(str(other), smaller, attempt=attempt, keep_last=2, finished=True)
    flags = ["--store", str(prepared.store), "--run", str(run), "--members", str(other)]
    assert evaluate.main([*flags, *QUICK, "--evaluate.ensemble", "2", "--evaluate.tta", "3"]) == 0
    return run, other


def find_test_files(prepared: Prepared, run: Path) -> dict[str, Path]:
    """The DICOM files of the evaluated studies by key."""
    evaluated = set(read_predictions(run).key.tolist())
    source = read_source(str(prepared.source))
    return {s.key: Path(s.url) for s in source.studies if s.key in evaluated}


def read_predictions(run: Path) -> Predictions:
    return Predictions.from_parquet((run / "predictions.parquet").read_bytes())


def read_rows(output: Path) -> dict[str, dict[str, str]]:
    with (output / "predictions.csv").open(newline="") as lines:
        return {row["file"]: row for row in csv.DictReader(lines)}


def read_summary(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def test_files_get_the_logits_that_their_studies_got(
    prepared: Prepared,
    ensemble: tuple[Path, Path],
    tmp_path: Path,
    make_dicom: DicomMaker,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, other = ensemble
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    by_key = find_test_files(prepared, run)
    for number, (key, path) in enumerate(by_key.items()):
        place = folder / f"ward {number % 3}" / f"{key}.dcm"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden").write_text("not looked at")
    (folder / "cut.dcm").write_bytes(next(iter(by_key.values())).read_bytes()[:900])
    (folder / "two frames").write_bytes(make_dicom(np.zeros((2, 40, 40), np.uint8)))

    flags = ["--source", str(folder), "--run", str(run), "--output", str(output)]
    members = ["--members", str(other), "--cluster.num-workers", "2"]
    assert predict.main([*flags, *members]) == 0

    rows, judged = read_rows(output), read_predictions(run)
    assert len(rows) == len(by_key) + 3
    found = {Path(name).stem: row for name, row in rows.items()}
    threshold = json.loads((run / "metrics.json").read_text())["operating_points"]["decision"][
        "threshold"
    ]
    assert threshold is not None
    for key, logit, probability in zip(
        judged.key.tolist(), judged.logit, judged.probability, strict=True
    ):
        row = found[key]
        assert float(row["logit"]) == pytest.approx(float(logit), abs=1e-4)
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-4)
        assert row["decision"] == str(int(float(row["probability"]) >= threshold))
        with Image.open(output / row["overlay"]) as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture.convert("L")).std() > 10
    assert {name: rows[name]["reason"] for name in ("notes.txt", "cut.dcm", "two frames")} == {
        "notes.txt": "not_dicom",
        "cut.dcm": rows["cut.dcm"]["reason"],
        "two frames": "multi_frame",
    }
    assert rows["cut.dcm"]["reason"] in ("not_dicom", "no_pixels", "undecodable")
    table = pq.read_table(output / "predictions.parquet")
    assert table["file"].to_pylist() == list(rows)

    summary = read_summary(output)
    assert (summary["files"], summary["scored"]) == (len(rows), len(by_key))
    assert summary["threshold"] == threshold
    assert len(summary["scoring"]["checkpoints"]) == 4
    assert summary["scoring"]["views"] == 3
    assert summary["decoded_at"] == read_manifest(str(prepared.store)).image_size
    assert "Research use only" in summary["notice"]
    assert "Research use only" in capsys.readouterr().out

    # The output lies in the source: its files are not taken for studies the second time.
    assert predict.main([*flags, *members]) == 2
    assert "holds predictions already" in capsys.readouterr().err
    assert predict.main([*flags, *members, "--overwrite", "--no-overlays"]) == 0
    assert list(read_rows(output)) == list(rows)
    assert not (output / "overlays").exists()


def test_files_are_decoded_to_the_pixels_of_the_store(prepared: Prepared) -> None:
    store = str(prepared.store)
    manifest = read_manifest(store)
    rows, size = read_studies(store, manifest), manifest.image_size
    studies = read_source(str(prepared.source)).studies[:20]
    images = read_pictures([study.url for study in studies], size)
    for study, image in zip(studies, images, strict=True):
        assert isinstance(image, GrayImage)
        assert digest_pixels(image.pixels) == rows[study.key].pixels_digest


def test_the_evaluation_says_how_its_logits_were_made(ensemble: tuple[Path, Path]) -> None:
    metrics = json.loads((ensemble[0] / "metrics.json").read_text())
    scoring = metrics["model"]["scoring"]
    members = [
        (run.name, entry.name)
        for run in ensemble
        for entry in reversed(read_index(str(run)).entries)
    ]
    assert [(c["run"], c["checkpoint"]) for c in scoring["checkpoints"]] == members
    run = ensemble[0]
    (checkpoint,) = set(read_predictions(run).checkpoint)
    assert checkpoint == " + ".join(f"{name}/{file}" for name, file in members)
    metadata = pq.read_schema(run / "predictions.parquet").metadata
    assert json.loads(metadata[b"pneumo.scoring"]) == scoring


def test_an_ensemble_is_not_read_in_part(
    ensemble: tuple[Path, Path], prepared: Prepared, tmp_path: Path, capsys: Any
) -> None:
    run, _ = ensemble
    flags = ["--source", str(prepared.source), "--run", str(run), "--output", str(tmp_path / "o")]
    assert predict.main(flags) == 2
    assert "2 of the 4 checkpoints that were evaluated are not there" in capsys.readouterr().err


def test_a_run_that_is_not_evaluated_gives_no_decision_and_says_so(
    prepared: Prepared, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = next((prepared.source / "stage_2_train_images").glob("*.dcm"))
    dataset = pydicom.dcmread(path)
    shutil.copyfile(path, folder / "a")
    dataset.PatientName = "SOMEBODY"
    dataset.save_as(folder / "b")
    output = tmp_path / "out"
    flags = ["--source", str(folder), "--run", str(trained), "--output", str(output)]
    assert predict.main(flags) == 0
    rows = read_rows(output)
    assert float(rows["a"]["logit"]) == pytest.approx(float(rows["b"]["logit"]), abs=1e-4)
    assert {row["decision"] for row in rows.values()} == {""}
    assert {row["calibrated_probability"] for row in rows.values()} == {""}
    summary = read_summary(output)
    assert summary["threshold"] is None
    assert summary["called_positive"] is None
    assert summary["threshold_reason"] == "the run is not evaluated"
    assert "no decision: the run is not evaluated" in capsys.readouterr().err
    assert not (trained / "metrics.json").exists()
    assert b"SOMEBODY" not in b"".join(p.read_bytes() for p in output.rglob("*") if p.is_file())


def test_nothing_that_can_be_scored_is_a_failure(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    flags = ["--source", str(folder), "--run", str(trained), "--output", str(output)]
    assert predict.main(flags) == 2
    assert "no file in it" in capsys.readouterr().err
    folder.mkdir()
    (folder / "notes.txt").write_text("not a picture")
    assert predict.main(flags) == 1
    assert "none of 1 files could be scored" in capsys.readouterr().err
    assert read_rows(output)["notes.txt"]["reason"] == "not_dicom"


def test_a_killed_prediction_is_repeated_and_replaces_nothing_else(
    prepared: Prepared, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(next((prepared.source / "stage_2_train_images").iterdir()), folder / "a.dcm")
    own = output / "overlays" / "own.dcm"
    own.parent.mkdir(parents=True)
    own.write_text("somebody's own")
    flags = ["--source", str(folder), "--run", str(trained), "--output", str(output)]
    assert predict.main([*flags, "--overwrite"]) == 2
    assert own.read_text() == "somebody's own"
    shutil.rmtree(output)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("jobs.prediction.write_predictions", kill)
        assert predict.main(flags) == 130
    assert (output / "overlays" / "a.dcm.png").exists()
    assert predict.main(flags) == 0
    written = ["overlays", "predictions.csv", "predictions.parquet", "summary.json"]
    assert sorted(path.name for path in output.iterdir()) == written == sorted(WRITTEN["predict"])


def test_members_of_an_archive_never_lead_out_of_the_output(
    prepared: Prepared, trained: Path, tmp_path: Path
) -> None:
    picture = next((prepared.source / "stage_2_train_images").iterdir()).read_bytes()
    names = ["../../../up.dcm", "a/../../../../up.dcm", f"{tmp_path}/absolute.dcm", "inside.dcm"]
    archive, output = tmp_path / "in" / "studies.zip", tmp_path / "a" / "b" / "out"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(name, picture)
    before = set(tmp_path.rglob("*"))

    flags = ["--source", str(archive), "--run", str(trained), "--output", str(output)]
    assert predict.main(flags) == 0

    assert set(tmp_path.rglob("*")) - before - set(output.rglob("*")) == {
        output,
        *(output.parents[0], output.parents[1]),
    }
    rows = read_rows(output)
    assert len(rows) == len(names)
    overlays = {row["overlay"] for row in rows.values()}
    assert len(overlays) == len(names)
    assert {str(p.relative_to(output)) for p in output.rglob("*.png")} == overlays


def test_a_logit_that_is_no_number_is_no_decision(
    prepared: Prepared, overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's scores overflow in part; a threshold would call NaN negative."""
    run = Path(shutil.copytree(overflowing, tmp_path / "run"))
    (run / "metrics.json").write_text(json.dumps(FROZEN))
    source = prepared.source / "stage_2_train_images"
    flags = ["--source", str(source), "--run", str(run), "--output", str(tmp_path / "out")]
    assert predict.main(flags) == 0
    rows, summary = read_rows(tmp_path / "out").values(), read_summary(tmp_path / "out")
    unscored = [row for row in rows if row["reason"] == "not_a_number"]
    assert 0 < len(unscored) < len(rows)
    for row in unscored:
        values = ("logit", "probability", "calibrated_probability", "decision", "overlay")
        assert {row[name] for name in values} == {""}
        assert "NaN or infinite" in row["message"]
    assert summary["scored"] == len(rows) - len(unscored)
    assert summary["unusable"] == {"not_a_number": len(unscored)}
    assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) <= summary["scored"]
    assert f"{len(unscored)} not usable: not_a_number" in capsys.readouterr().out

    only = tmp_path / "only"
    only.mkdir()
    shutil.copyfile(source / unscored[0]["file"], only / "a.dcm")
    flags = ["--source", str(only), "--run", str(run), "--output", str(tmp_path / "none")]
    assert predict.main(flags) == 1
    assert "none of 1 files could be scored" in capsys.readouterr().err


def test_one_long_path_makes_no_other_row_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.prediction.load_members", lambda *_: [])
    where, settings = str(tmp_path), WorkerSettings("cpu", 1, 1000)
    task = Task(where, where, Scoring(()), 32, overlays=False, worker=settings)
    files = ["/".join(["x" * 200] * 15), *map(str, range(4000))]
    tracemalloc.start()
    found = predict_files(task, files)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000
    assert found.file.tolist() == sorted(files)
    assert found.unusable == {"missing": len(files)}


FROZEN: dict[str, Any] = {
    "operating_points": {"decision": {"threshold": 0.5}},
    "model": {},
    "dataset": {"image_size": 64},
    "calibration": {"method": "platt", "slope": 1.0, "intercept": 0.0},
}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=300))
def test_an_overlays_path_fits_on_a_disk_and_is_one_files_own(name: str) -> None:
    short = shorten_path(name)
    assert not {"", ".", ".."} & set(short.split("/"))
    assert all(len(f"{part}.png".encode()) <= 255 for part in short.split("/"))
    assert short == name or shorten_path(f"{name}x") != short
