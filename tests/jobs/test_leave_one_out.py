"""Each store is left out of a training on the others, and judged by it."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import leave_one_out, prepare
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
from pneumo.dataset.phantoms.source_folder import write_phantoms
from tests.jobs.conftest import Prepared

QUICK = [
    *("--model.backbone", "resnet18", "--train.epochs", "1", "--data.image-size", "32"),
    *("--evaluate.bootstrap-resamples", "200", "--evaluate.pictures", "1"),
    *("--evaluate.saliency", "false", "--evaluate.min-patients", "2"),
    *("--tracking.mode", "disabled", "--train.batch-size", "16"),
]


@pytest.fixture(scope="module")
def stores(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("several")
    for name, layout, seed in (("chexpert", "chexpert", 8), ("own", "own-table", 9)):
        source = folder / f"{name} source"
        write_phantoms(source, num_studies=60, seed=seed, layout=PHANTOM_LAYOUTS[layout])
        shutil.copytree(prepared.source / ".pneumo", source / ".pneumo")
        (source / ".pneumo" / "split_salts.json").unlink(missing_ok=True)
        flags = ["--source", str(source), "--store", str(folder / name)]
        assert prepare.main([*flags, "--prepare.image-size", "64"]) == 0
    return [str(prepared.store), str(folder / "chexpert"), str(folder / "own")]


@pytest.mark.slow  # three trainings and three evaluations
def test_each_store_in_turn(
    stores: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--stores", ",".join(stores), "--run", str(tmp_path), *QUICK]
    assert leave_one_out.main(flags) == 0
    told = capsys.readouterr().out.splitlines()
    for left in stores:
        name = Path(left).name
        run = tmp_path / f"without-{name}"
        assert name in json.loads((run / "external" / "metrics.json").read_text())["matrix"]
        assert any(line.startswith(name) and " at home " in line for line in told)
        joined = read_manifest(str(run / "store"))
        trained_on = [read_manifest(url) for url in stores if url != left]
        most = sum(m.splits["train"].samples for m in trained_on)
        assert 0 < joined.splits["train"].samples <= most
    assert leave_one_out.main(flags) == 0  # all is done


def test_one_store_cannot_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave_one_out.main(["--stores", "a", "--run", "r"]) == 2
    assert "two or more" in capsys.readouterr().err
