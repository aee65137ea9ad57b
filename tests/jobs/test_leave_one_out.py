"""Each store is left out of a training on the others, and judged by it."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import leave_one_out, prepare
from pneumo.command_line import parse_command_line
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
from pneumo.dataset.phantoms.source_folder import write_phantoms
from tests.conftest import write_store
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
        ("--stores @a,@b --run @r --balanced", "--balanced: has no effect"),
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
    found = leave_one_out.split_flags([*both, *train, *evaluate])
    assert found[0] == [*both, *train]
    assert found[1][:-2] == [*both, *evaluate]


def test_evaluations_are_not_elastic_whatever_the_trainings_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "elastic.toml"
    recipe.write_text("cluster.num_workers = 2\ncluster.min_workers = 1\n")
    monkeypatch.setenv("PNEUMO_CLUSTER__MIN_WORKERS", "1")
    given = ["--recipe", str(recipe), "--cluster.min-workers", "1"]
    train, evaluate = leave_one_out.split_flags(given)
    assert parse_command_line("train", ["--store", "a", *train]).config.cluster.min_workers == 1
    parse_command_line("evaluate", ["--store", "a", "--run", "r", *evaluate])  # is not refused


def make_stores(folder: Path, names: str, seed: int = 0) -> str:
    """Small stores in `folder`, for `--stores`."""
    urls = [write_store(folder / name, seed=seed + i) for i, name in enumerate(names)]
    return ",".join(urls)


def make_results(run: Path, names: str, auroc: float | None = 0.75) -> None:
    """Finished runs in `run`, each of which leaves one of these stores out."""
    for name in names:
        folder = run / f"without-{name}"
        (folder / "external").mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        matrix = {"own test": {"value": auroc}, name: {"value": 0.5}}
        (folder / "external" / "metrics.json").write_text(json.dumps({"matrix": matrix}))


def test_finished_runs_are_shown_also_without_an_auroc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_results(tmp_path, "a")
    make_results(tmp_path, "b", None)
    stores = make_stores(tmp_path, "ab")
    assert leave_one_out.main(["--stores", stores, "--run", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "own test 0.750  on a 0.500" in first
    assert "own test -  on b 0.500" in second


def test_finished_runs_are_not_shown_as_those_of_other_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without a was trained on b alone, not on b and c."""
    make_results(tmp_path, "abc")
    run = ["--run", str(tmp_path)]
    a, b, c = make_stores(tmp_path, "abc").split(",")
    assert leave_one_out.main(["--stores", f"{a},{b}", *run]) == 0
    assert leave_one_out.main(["--stores", f"{b},{a}", *run]) == 0
    capsys.readouterr()
    assert leave_one_out.main(["--stores", f"{a},{b},{c}", *run]) == 2
    assert "of the stores a, b; give another --run for a, b, c" in capsys.readouterr().err
    other = make_stores(tmp_path / "v2", "ab", seed=5)
    assert leave_one_out.main(["--stores", other, *run]) == 2
    found = capsys.readouterr()
    assert "of other contents of a, b; give another --run for a, b" in found.err
    assert found.out == ""
    assert leave_one_out.main(["--stores", "/does/not/exist/a,/does/not/exist/b", *run]) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_finished_runs_are_not_shown_as_those_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_results(tmp_path, "ab")
    for name in "ab":
        changed = override(Config(), {"train.epochs": 7})
        (tmp_path / f"without-{name}" / "config.json").write_text(changed.to_json())
    stores = make_stores(tmp_path, "ab")
    flags = ["--stores", stores, "--run", str(tmp_path), "--evaluate.pictures", "3"]
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
