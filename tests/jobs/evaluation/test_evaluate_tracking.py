"""jobs.evaluate and a W&B server: what arrives there, and that no fault of it matters here."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, track
from jobs.ray_cluster.session import ray_session
from jobs.tracking.sender import read_runs
from jobs.tracking.sending import command
from pneumo.dataset.manifest import read_manifest
from pneumo.evaluation.predictions import Predictions
from pneumo.reporting.tracking.tracked_run import make_run_id
from tests.jobs.conftest import Prepared, list_identifiers
from tests.pneumo.reporting.tracking.wandb_server import KEY, Backend

pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
QUICK = [
    *("--evaluate.bootstrap-resamples", "100", "--evaluate.min-patients", "1"),
    *("--evaluate.pictures", "1", "--tracking.mode", "online"),
]


@pytest.fixture(scope="module", autouse=True)
def _ray(prepared: Prepared, trained: Path) -> Iterator[None]:
    """Ray runs before a test has another HOME, where Ray would find no token. That of `ray_here`
    may be gone: test_demo.py ends it."""
    with ray_session():
        yield


def evaluate_copy(prepared: Prepared, trained: Path, folder: Path, *flags: str) -> Path:
    """Evaluate a copy of the run; it must end well, with its marker."""
    run = Path(shutil.copytree(trained, folder / "the run"))
    arguments = ["--store", str(prepared.store), "--run", str(run), *QUICK, *flags]
    assert evaluate.main(arguments) == 0
    assert (run / "metrics.json").exists()
    return run


def read_text(content: bytes) -> str:
    """What somebody could read in a file."""
    if content[:4] == b"PAR1":
        return str(pq.read_table(io.BytesIO(content)).to_pylist())
    return content.decode("latin-1")


def find_identifiers(prepared: Prepared, files: dict[str, bytes]) -> list[tuple[str, str]]:
    """Which file names whom."""
    words = re.compile(r"[0-9A-Za-z._-]+")
    wanted = list_identifiers(prepared.source)
    return [
        (name, word)
        for name, content in files.items()
        for word in set(words.findall(read_text(content))) & wanted
    ]


def test_all_arrives_and_nobody_is_named(
    prepared: Prepared,
    trained: Path,
    backend: Backend,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = evaluate_copy(prepared, trained, tmp_path)
    assert f"W&B: {backend.url}" in capsys.readouterr().err
    digest, name = read_manifest(str(prepared.store)).digest, make_run_id(str(run))
    assert backend.used == [f"dataset-{digest[:12]}", f"model-{name}"]
    states = {made["name"]: made["state"] for made in backend.artifacts.values()}
    assert set(states.values()) == {"COMMITTED"}
    assert f"evaluation-{name}" in states
    assert backend.unknown == []

    (identity,) = backend.runs
    summary = backend.summary(identity)
    metrics = json.loads((run / "metrics.json").read_text())
    assert summary["eval/test/auroc"] == pytest.approx(metrics["test"]["auroc"]["value"])
    for key in ("eval/roc_table", "eval/predictions", "eval/report", "data/contact"):
        assert key in summary

    shown = [key for row in backend.history() for key in row if "/" in key]
    assert sorted(shown) == sorted(key for key in summary if key in shown)
    pictures = [c for n, c in backend.uploads.items() if "/eval/gallery/" in n and n[-3:] == "png"]
    assert pictures
    (table,) = [c for c in backend.uploads.values() if c[:4] == b"PAR1"]
    sent = Predictions.from_parquet(table)
    assert len(sent) == metrics["val"]["n"] + metrics["test"]["n"]
    assert np.nanmax(sent.age) <= 90

    kept = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert find_identifiers(prepared, dict(backend.uploads)) == []
    assert find_identifiers(prepared, {n: c for n, c in kept.items() if n[-3:] != ".pt"}) == []
    told = json.dumps([backend.runs, backend.artifacts, backend.stream])
    assert find_identifiers(prepared, {"told": told.encode()}) == []
    named = next(iter(list_identifiers(prepared.source)))
    assert find_identifiers(prepared, {"a": f"<p>{named}</p>".encode()}) == [("a", named)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong key", "away", "uploads 403"])
def test_no_fault_of_the_server_matters_and_the_command_completes_it(
    prepared: Prepared,
    trained: Path,
    backend: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    if fault == "wrong key":
        monkeypatch.setenv("WANDB_API_KEY", "9" * 40)
    else:
        backend.fault = "away" if fault == "away" else "uploads 403"
    run = evaluate_copy(prepared, trained, tmp_path, "--evaluate.saliency", "false")
    said = capsys.readouterr().err
    assert f"to send it: {command(str(run))}" in said
    assert KEY not in said
    backend.fault = None
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for _ in range(2):
        assert track.main(["--run", str(run)]) == 0
        assert sorted(backend.runs) == sorted(
            told.id for told in read_runs(str(run), ["train", "evaluate"], ())
        )
        assert set(backend.exit_codes.values()) == {0}
        (identity,) = [one for one in backend.runs if "-evaluate-" in one]
        assert len(backend.history(identity)) == 1
    assert {one["state"] for one in backend.artifacts.values()} == {"COMMITTED"}
    assert any("/eval/gallery/" in name for name in backend.uploads)
