"""An evaluated run is judged on another set by what is frozen, without those whom it knows."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import evaluate, prepare
from jobs.evaluation.external_wandb import read_external
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.study_table import read_studies
from pneumo.evaluation.predictions import Predictions
from tests.jobs.conftest import Prepared

QUICK = [
    *("--evaluate.bootstrap-resamples", "200", "--evaluate.pictures", "1"),
    *("--evaluate.saliency", "false"),
    *("--tracking.mode", "disabled"),
]


@pytest.fixture(scope="module")
def sets(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of other sets under the secret of the run's: CheXpert's layout, the same patients in
    NIH's layout, and one at another size."""
    folder = tmp_path_factory.mktemp("sets")
    for name, layout, seed, size in (
        ("chexpert", "chexpert", 8, "64"),
        ("same", "nih", 3, "64"),
        ("larger", "own-table", 9, "80"),
    ):
        source = folder / f"{name} source"
        write_phantoms(source, num_studies=60, seed=seed, layout=PHANTOM_LAYOUTS[layout])
        shutil.copytree(prepared.source / ".pneumo", source / ".pneumo")
        (source / ".pneumo" / "split_salts.json").unlink(missing_ok=True)
        flags = ["--source", str(source), "--store", str(folder / name)]
        assert prepare.main([*flags, "--prepare.image-size", size]) == 0
    return folder


def judge(
    prepared: Prepared,
    run: Path,
    *external: Path,
    flags: tuple[str, ...] = (),
    min_patients: int = 2,
) -> int:
    where = ["--store", str(prepared.store), "--run", str(run)]
    where += ["--evaluate.min-patients", str(min_patients)]
    stores = ",".join(str(one) for one in external)
    return evaluate.main([*where, "--external", stores, *QUICK, *flags])


def test_external_validation(
    prepared: Prepared, evaluated: Path, sets: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    flags = ("--tracking.project", "other", "--tracking.group", "elsewhere")
    assert judge(prepared, run, sets / "chexpert", flags=flags) == 0
    report = run / "report.html"
    assert all(path.read_bytes() == data for path, data in before.items() if path != report)
    own = json.loads((run / "metrics.json").read_text())
    metrics = json.loads((run / "external" / "metrics.json").read_text())
    found = metrics["sets"]["chexpert"]
    assert metrics["thresholds"]["decision"] == own["operating_points"]["decision"]["threshold"]
    assert found["auroc"]["internal"]["value"] == pytest.approx(own["test"]["auroc"]["value"])
    assert found["sensitivity"]["decision"]["internal"]["value"] == pytest.approx(
        own["test"]["recall"]["value"]
    )
    assert found["layout"] == "chexpert"
    manifest = read_manifest(str(sets / "chexpert"))
    studies = read_studies(str(sets / "chexpert"), manifest)
    assert found["external"]["n"] == len(studies)
    table = run / "external" / "chexpert" / "predictions.parquet"
    assert set(Predictions.from_parquet(table.read_bytes()).key.tolist()) == studies.keys()
    assert (run / "external" / "matrix.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "external" / "report.html").read_text()
    for text in (page, report.read_text()):
        assert "External validation" in text
        assert "phantoms, no radiographs" in text
        assert f"{found['auroc']['external']['value']:.3f}" in text
    sent = read_external(str(run))
    assert sent is not None
    assert sent.summary["eval/external/chexpert/auroc"] == found["auroc"]["external"]["value"]
    assert sent.summary["eval/external/chexpert/n"] == len(studies)
    assert "-external-" in sent.id
    assert (sent.tracking.project, sent.group) == ("other", "elsewhere")
    assert "own test" in capsys.readouterr().out


def test_each_run_adds_a_row_to_the_matrix(
    prepared: Prepared, evaluated: Path, sets: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    other = Path(shutil.copytree(evaluated, tmp_path / "other"))
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    flags = ("--compare-with", str(other))
    assert judge(prepared, run, sets / "chexpert", flags=flags) == 2  # judged on no set yet
    assert judge(prepared, other, sets / "chexpert") == 0
    assert judge(prepared, run, sets / "chexpert", flags=flags) == 0
    metrics = json.loads((run / "external" / "metrics.json").read_text())
    assert metrics["matrix_of_others"] == {"other": metrics["matrix"]}
    assert (run / "report.html").read_text().count('<h2 id="elsewhere">') == 1
    third = Path(shutil.copytree(evaluated, tmp_path / "third"))
    (third / "report.html").unlink()  # nothing is lost by that
    left = third / "external" / "gone" / "predictions.parquet"  # of an evaluation on another set
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    flags = ("--compare-with", str(run))
    assert judge(prepared, third, sets / "chexpert", flags=flags) == 0
    assert "has no report.html" in capsys.readouterr().err
    metrics = json.loads((third / "external" / "metrics.json").read_text())
    assert metrics["matrix_of_others"].keys() == {"run", "other"}
    assert metrics["digests"] == {"chexpert": read_manifest(str(sets / "chexpert")).digest}
    assert sorted(path.name for path in (third / "external").iterdir()) == [
        *("chexpert", "matrix.png", "metrics.json", "report.html")
    ]


def test_what_cannot_be_judged_is_told_at_once(
    prepared: Prepared, evaluated: Path, trained: Path, sets: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(message: str, run: Path, external: Path, min_patients: int = 2) -> None:
        capsys.readouterr()
        assert judge(prepared, run, external, min_patients=min_patients) == 2
        assert message in capsys.readouterr().err
        assert not (run / "external").exists()

    refuse("is not evaluated on its own store", trained, sets / "chexpert")
    refuse("pictures of 80 px, the run's own are 64 px", evaluated, sets / "larger")
    refuse("is the store of the training", evaluated, prepared.store)
    refuse("no manifest.json", evaluated, tmp_path)
    refuse("patients with a positive study are left", evaluated, sets / "same", min_patients=50)
    other = Path(shutil.copytree(sets / "same", tmp_path / "other secret"))
    (other / "secret_check.txt").write_text("another\n")
    refuse("RSNA's patients are a part of NIH's", evaluated, other)
    capsys.readouterr()
    flags = ["--store", str(sets / "chexpert"), "--run", str(evaluated), "--overwrite"]
    assert evaluate.main(flags) == 2
    assert "--external" in capsys.readouterr().err
