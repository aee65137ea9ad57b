"""What the demo is told, what it repeats, and how it trains: workers and precision."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs.demo import choose_precision, count_workers, main


@pytest.mark.parametrize(
    "flags",
    [["--studies", "0"], ["--studies", "x"], ["--sudies", "9"], ["--stud", "9"], ["--run", ""]],
)
def test_a_wrong_flag_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert flags[0] in line
    assert "see python -m jobs.demo --help" in line


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PNEUMO_TRAIN__LRR", "1", "train.lrr in the environment"),
        ("PNEUMO_CLUSTER__NUM_WORKERS", "2", "a search uses all workers"),
    ],
)
def test_a_wrong_variable_is_told_before_anything_is_drawn(
    variable: str,
    value: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_demo_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index = {"finished": True, "entries": [{"epoch": 9}]}
    for name, text in (
        ("store/manifest.json", "{}"),
        ("run/tune/best.toml", ""),
        ("run/train/checkpoints/index.json", json.dumps(index)),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    called = []
    for job in ("preparation.prepare", "tuning.job.tune", "training.job.train"):
        monkeypatch.setattr(f"jobs.{job}", lambda invocation: called.append(invocation.job))
    monkeypatch.setattr("jobs.evaluation.job.evaluate_run", lambda one: called.append(one.job))
    monkeypatch.setattr("jobs.ray_cluster.session.ray_session", lambda **_: nullcontext())
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2})
    monkeypatch.chdir(tmp_path)
    flags = ["--store", "store", "--run", "run", "--studies", "3"]
    assert main(flags) == 0
    assert called == ["prepare", "evaluate"]
    (tmp_path / "run" / "train" / "metrics.json").write_text("{}")
    assert main(flags) == 2


@pytest.mark.parametrize(
    ("instructions", "gpus", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, 0, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, 0, "bfloat16"),
        ({"avx512_bf16": False, "avx512_f": True}, 0, "auto"),
        ({}, 0, "auto"),  # another architecture
        ({"avx512_bf16": True}, 1, "auto"),
    ],
)
def test_it_computes_in_bfloat16_where_the_processor_does(
    instructions: dict[str, bool], gpus: float, precision: str
) -> None:
    assert choose_precision(instructions, {"CPU": 2, "GPU": gpus}) == precision


@pytest.mark.parametrize(
    ("resources", "workers"),
    [({"CPU": 2}, 2), ({"CPU": 64}, 2), ({"GPU": 0}, 2), ({"GPU": 1}, 1), ({"GPU": 8}, 2)],
)
def test_it_asks_for_no_more_gpus_than_there_are(resources: dict[str, float], workers: int) -> None:
    assert count_workers(resources) == workers
