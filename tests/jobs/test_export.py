"""A run leaves as ONNX: what it says outside is what `jobs.predict` says."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pydicom
import pytest
import torch

from jobs import evaluate, export, predict
from jobs.exported.preprocessing import read_picture
from jobs.terminal.places import WRITTEN
from pneumo.training.checkpoints import read_index
from tests.conftest import DicomMaker, draw_chest
from tests.jobs.conftest import Prepared

QUICK = [
    *("--evaluate.min-patients", "1", "--evaluate.saliency", "false"),
    *("--evaluate.bootstrap-resamples", "100", "--tracking.mode", "disabled"),
    *("--evaluate.pictures", "1"),
]
NOTICE = "Research use only, never a diagnostic device."
SCORE = """
import runpy, sys
folder, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, folder)
sys.argv[0] = folder + "/score.py"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    names = {name.split(".")[0] for name in sys.modules}
    print(*sorted(names - set(sys.stdlib_module_names)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def evaluated(prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, evaluated as the mean of its two checkpoints."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run"))
    flags = ["--store", str(prepared.store), "--run", str(run), "--evaluate.ensemble", "2"]
    assert evaluate.main([*flags, *QUICK]) == 0
    return run


@pytest.fixture(scope="module")
def exported(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export.main(["--run", str(evaluated), "--output", str(folder)]) == 0
    return folder


def score(folder: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-B", "-c", SCORE, str(folder), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_50_studies_are_scored_as_jobs_predict_scores_them(
    prepared: Prepared, evaluated: Path, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted((prepared.source / "stage_2_train_images").glob("*.dcm"))[:50]:
        dataset = pydicom.dcmread(path)
        dataset.decompress()
        dataset.save_as(folder / path.name)
    flags = ["--source", str(folder), "--run", str(evaluated), "--output", str(tmp_path / "out")]
    assert predict.main([*flags, "--no-overlays"]) == 0
    with (tmp_path / "out" / "predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 50

    rule = json.loads((exported / "preprocessing.json").read_text())
    pixels = np.concatenate([read_picture(folder / row["file"], rule) for row in rows])
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    probability, logit = session.run(["probability", "logit"], {"pixels": pixels})
    assert probability.shape == logit.shape == (50,)
    np.testing.assert_allclose(logit, read_column(rows, "logit"), atol=1e-5, rtol=0)
    calibrated = read_column(rows, "calibrated_probability")
    np.testing.assert_allclose(probability, calibrated, atol=1e-5, rtol=0)
    program = torch.export.load(exported / "model.pt2").module()
    for part in (slice(0, 1), slice(1, 50)):
        found = program(torch.from_numpy(pixels[part]))
        np.testing.assert_allclose(found[0].detach(), calibrated[part], atol=1e-5, rtol=0)
        np.testing.assert_allclose(found[1].detach(), logit[part], atol=1e-5, rtol=0)

    row = rows[7]
    done = score(exported, folder / row["file"])
    assert done.returncode == 0, done.stderr
    assert set(done.stderr.split()) >= {"numpy", "onnxruntime", "pydicom"}
    assert not set(done.stderr.split()) & {"pneumo", "jobs", "torch", "cv2", "scipy"}
    said = json.loads(done.stdout)
    assert said["logit"] == pytest.approx(float(row["logit"]), abs=1e-5)
    assert said["probability"] == pytest.approx(float(row["calibrated_probability"]), abs=1e-5)
    assert said["decision"] == bool(int(row["decision"]))
    assert said["notice"] == NOTICE


def read_column(rows: list[dict[str, str]], name: str) -> Any:
    return np.array([float(row[name]) for row in rows])


def test_a_file_that_is_refused_gets_no_score(
    exported: Path, tmp_path: Path, make_dicom: DicomMaker
) -> None:
    lateral = make_dicom(draw_chest(200), elements={"ViewPosition": "LL"}, identifier="SOMEBODY")
    (tmp_path / "a.dcm").write_bytes(lateral)
    done = score(exported, tmp_path / "a.dcm")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"no score: the header does not say a frontal view. {NOTICE}" in done.stderr
    assert "SOMEBODY" not in done.stderr


def test_the_folder_says_what_it_is(evaluated: Path, exported: Path) -> None:
    lines = [line.split() for line in (exported / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} | {"SHA256SUMS"} == {
        p.name for p in exported.glob("*.*")
    } | {"SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest

    metrics = json.loads((evaluated / "metrics.json").read_text())
    rule = json.loads((exported / "preprocessing.json").read_text())
    point = metrics["operating_points"]["decision"]
    assert rule["threshold_logit"] == point["threshold_logit"]
    assert rule["calibration"]["slope"] == metrics["calibration"]["slope"]
    digests = [entry.sha256 for entry in reversed(read_index(str(evaluated)).entries)]
    assert [one["sha256"] for one in rule["checkpoints"]] == digests
    assert rule["store_digest"] == metrics["dataset"]["digest"]
    assert rule["trained_on_phantoms"] is True
    assert rule["onnx_differs_by"] < 1e-4

    inside = onnxruntime.InferenceSession(exported / "model.onnx").get_modelmeta()
    assert inside.custom_metadata_map["notice"] == inside.description == NOTICE
    assert float(inside.custom_metadata_map["threshold_logit"]) == point["threshold_logit"]
    onnx.checker.check_model(onnx.load(exported / "model.onnx"))
    for name in ("README.md", "model_card.md"):
        text = (exported / name).read_text()
        assert NOTICE in text
        assert "phantoms" in text
    card = (exported / "model_card.md").read_text()
    assert all(digest in card for digest in digests)
    assert f"AUROC {metrics['test']['auroc']['value']:.3f}" in card


def edit(run: Path, tmp_path: Path, **changes: Any) -> list[str]:
    """The flags for the run with another metrics.json."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    metrics = json.loads((copy / "metrics.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = metrics
        for parent in parents:
            place = place[parent]
        place[last] = value
    (copy / "metrics.json").write_text(json.dumps(metrics))
    return ["--run", str(copy), "--output", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"operating_points__decision": {"threshold": None, "reason": "val is too small"}},
            "no threshold to export: val is too small",
        ),
        ({"operating_points__decision__threshold_logit": None}, "an older version evaluated it"),
        ({"calibration": {"reason": "val has one class"}}, "no calibration to export: val has one"),
        ({"model__scoring__views": 4}, "evaluated in 4 views"),
        ({"model__scoring__checkpoints": [{"sha256": "0"}]}, "1 of the 1 checkpoints"),
        ({"model": None}, "no evaluation that this version reads"),
    ],
)
def test_a_run_that_cannot_be_exported_is_refused(
    evaluated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert export.main(edit(evaluated, tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(
    evaluated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    assert export.main(["--run", str(evaluated), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == ("error: export: onnx and onnxscript are missing; pip install 'pneumo[onnx]'\n")


def test_places_are_looked_at_first(
    trained: Path, evaluated: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(["--run", str(trained), "--output", str(exported / "new")]) == 2
    assert "is not evaluated; evaluate it first" in capsys.readouterr().err
    flags = ["--run", str(evaluated), "--output", str(exported)]
    assert export.main(flags) == 2
    assert "holds an export already; give another --output, or --overwrite" in (
        capsys.readouterr().err
    )
    before = (exported / "model_card.md").read_bytes()
    assert {path.name for path in exported.iterdir()} == set(WRITTEN["export"])
    assert export.main([*flags, "--overwrite"]) == 0
    assert (exported / "model_card.md").read_bytes() == before
