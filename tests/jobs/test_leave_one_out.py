"""Each store is left out of a training on the others, and judged by it."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import leave_one_out, prepare
from pneumo.config import Config
from pneumo.config_layers import override
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
        assert any(line.startswith(name) and " own test " in line for line in told)
        joined = read_manifest(str(run / "store"))
        trained_on = [read_manifest(url) for url in stores if url != left]
        most = sum(m.splits["train"].samples for m in trained_on)
        assert 0 < joined.splits["train"].samples <= most
    assert leave_one_out.main(flags) == 0  # all is done


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--run @r", "required: --stores"),
        ("--stores @a --run @r", "two or more"),
        ("--stores @a,@b --run @r --train.epocs 3", "unknown setting --train.epocs"),
        ("--stores @a,@b --run @r --evaluate.picture 3", "unknown setting --evaluate.picture"),
        ("--stores @a,@b --run @r --recipe @no.toml", "no.toml: not found"),
        ("--stores @a,@b --run @r", "a: no manifest.json"),
    ],
)
def test_a_mistake_is_told_before_the_first_training(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave_one_out.main(flags.replace("@", f"{tmp_path}/").split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "r").exists()


def test_settings_go_to_the_jobs_that_have_them() -> None:
    both, train, evaluate = (
        ["--recipe", "fast", "--seed=3"],
        ["--train.lr", "1"],
        ["--evaluate.x=2"],
    )
    elastic = ["--cluster.min-workers", "1"]
    found = leave_one_out.split_flags([*both, *train, *evaluate, *elastic])
    assert found == ([*both, *train, *elastic], [*both, *evaluate])


def test_finished_runs_are_shown_also_without_an_auroc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, auroc in (("a", 0.75), ("b", None)):
        (tmp_path / f"without-{name}" / "external").mkdir(parents=True)
        (tmp_path / f"without-{name}" / "metrics.json").write_text("{}")
        matrix = {"own test": {"value": auroc}, name: {"value": 0.5}}
        path = tmp_path / f"without-{name}" / "external" / "metrics.json"
        path.write_text(json.dumps({"matrix": matrix}))
    assert leave_one_out.main(["--stores", "a,b", "--run", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "own test 0.750  on a 0.500" in first
    assert "own test -  on b 0.500" in second


def test_finished_runs_are_not_shown_as_those_of_other_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without a was trained on b alone, not on b and c."""
    for name in "abc":
        (tmp_path / f"without-{name}" / "external").mkdir(parents=True)
        (tmp_path / f"without-{name}" / "metrics.json").write_text("{}")
        matrix = {"own test": {"value": 0.5}, name: {"value": 0.5}}
        path = tmp_path / f"without-{name}" / "external" / "metrics.json"
        path.write_text(json.dumps({"matrix": matrix}))
    assert leave_one_out.main(["--stores", "a,b", "--run", str(tmp_path)]) == 0
    assert leave_one_out.main(["--stores", "b,a", "--run", str(tmp_path)]) == 0
    capsys.readouterr()
    assert leave_one_out.main(["--stores", "a,b,c", "--run", str(tmp_path)]) == 2
    assert "of the stores a, b; give another --run for a, b, c" in capsys.readouterr().err


def test_finished_runs_are_not_shown_as_those_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        run = tmp_path / f"without-{name}"
        (run / "external").mkdir(parents=True)
        (run / "metrics.json").write_text("{}")
        (run / "config.json").write_text(override(Config(), {"train.epochs": 7}).to_json())
        matrix = {"own test": {"value": 0.5}, name: {"value": 0.5}}
        (run / "external" / "metrics.json").write_text(json.dumps({"matrix": matrix}))
    flags = ["--stores", "a,b", "--run", str(tmp_path), "--evaluate.pictures", "3"]
    assert leave_one_out.main([*flags, "--train.epochs", "99"]) == 2
    assert not (tmp_path / "stores.json").exists()  # nothing is begun
    assert leave_one_out.main([*flags, "--train.epochs", "7"]) == 0
    told = capsys.readouterr().err
    assert f"leave-one-out: {tmp_path}/without-a: reused" in told
    assert f"leave-one-out: {tmp_path}/without-b: reused" in told
    assert leave_one_out.main([*flags, "--train.epochs", "99", "--seed", "5"]) == 2
    found = capsys.readouterr()
    assert "without-a: was started with other settings in" in found.err
    assert "train" in found.err
    assert "own test" not in found.out


def test_stores_of_one_name_would_share_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave_one_out.main(["--stores", "a/store,b/store/", "--run", "r"]) == 2
    assert "two have the same name" in capsys.readouterr().err
