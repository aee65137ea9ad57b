"""What the laptop finds where a run writes: the settings that it was begun with, and its logs."""

import json
from pathlib import Path

import fsspec
import pytest

from cluster import run_folder
from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.errors import RunError


def _begin(folder: Path, config: Config, **index: object) -> str:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    (folder / "checkpoints" / "index.json").write_text(json.dumps({"entries": [{}], **index}))
    return str(folder)


def test_a_run_begun_with_other_settings_is_refused(tmp_path: Path) -> None:
    url = _begin(tmp_path / "run", Config())
    run_folder.check_run(Config(), url)
    run_folder.check_run(override(Config(), {"train.compile": True, "tune.num_trials": 9}), url)
    other = override(Config(), {"train.lr": 0.5, "seed": 7})
    with pytest.raises(RunError, match="was started with other settings in seed, train; repeat"):
        run_folder.check_run(other, url)


def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds a finished run; give another --run"):
        run_folder.check_run(Config(), _begin(tmp_path / "run", Config(), finished=True))


def test_what_cannot_be_read_is_left_to_the_job(tmp_path: Path) -> None:
    run_folder.check_run(Config(), str(tmp_path / "nothing"))
    url = _begin(tmp_path / "run", Config())
    (tmp_path / "run" / "config.json").write_text("{}{")
    run_folder.check_run(override(Config(), {"seed": 7}), url)


def test_logs_are_read_in_their_order(tmp_path: Path) -> None:
    for name in ("20260102-030405", "20260101-030405"):
        (tmp_path / f"{name}.log").write_text(f"{name} said this\n")
    assert [log.name for log in run_folder.read_logs(str(tmp_path))] == [
        "20260101-030405",
        "20260102-030405",
    ]
    assert run_folder.read_logs(str(tmp_path / "nowhere")) == []
    (tmp_path / "20260103-000000").mkdir()
    (tmp_path / "20260103-000000" / "20260101-120000.log").write_text("of another submission")
    assert [log.name for log in run_folder.read_logs(str(tmp_path))] == [
        "20260101-030405",
        "20260101-120000",
        "20260102-030405",
    ]


def test_a_log_of_any_name_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("20260101-030405.log", "../../../up.log", f"{tmp_path}/absolute.log"):
        memory.pipe(f"/kept/{name}", b"said\n")
    assert [log.name for log in run_folder.read_logs("memory://kept")][:1] == ["20260101-030405"]
    assert list(tmp_path.iterdir()) == []
