"""jobs.evaluate and a W&B server: what arrives there, and that no fault of it matters here."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import evaluate
from jobs.ray_cluster.session import ray_session
from pneumo.dataset.manifest import read_manifest
from pneumo.evaluation.predictions import Predictions
from pneumo.reporting.tracking.transaction_log import read_records
from tests.jobs.conftest import Prepared, list_identifiers
from tests.pneumo.reporting.tracking.test_tracker import KEY, clean_environment  # noqa: F401
from tests.pneumo.reporting.tracking.wandb_server import Backend, serve

pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
QUICK = [
    *("--evaluate.bootstrap-resamples", "100", "--evaluate.min-patients", "1"),
    *("--evaluate.pictures", "1", "--tracking.mode", "online"),
]
"""Half of what is stored."""


@pytest.fixture(scope="module", autouse=True)
def _ray(prepared: Prepared, trained: Path) -> Iterator[None]:
    """Ray runs before a test has another HOME, where Ray would find no token. That of `ray_here`
    may be gone: test_demo.py ends it."""
    with ray_session():
        yield


@pytest.fixture
def server(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:  # noqa: F811
    with serve(KEY) as backend:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", backend.url)
        yield backend


def evaluate_copy(prepared: Prepared, trained: Path, folder: Path, *flags: str) -> Path:
    """Evaluate a copy of the run; it must end well, with its marker."""
    run = Path(shutil.copytree(trained, folder / "the run"))
    arguments = ["--store", str(prepared.store), "--run", str(run), *QUICK, *flags]
    assert evaluate.main(arguments) == 0
    assert (run / "metrics.json").exists()
    return run


def read_text(name: str, content: bytes) -> str:
    """What somebody could read in a file."""
    if content[:4] == b"PAR1":
        return json.dumps(pq.read_table(io.BytesIO(content)).to_pylist())
    if name.endswith(".wandb"):
        return "".join(map(str, read_records(content)))
    return content.decode("latin-1")


def find_identifiers(prepared: Prepared, files: dict[str, bytes]) -> list[tuple[str, str]]:
    """Which file names whom."""
    words = re.compile(r"[0-9A-Za-z._-]+")
    wanted = list_identifiers(prepared.source)
    return [
        (name, word)
        for name, content in files.items()
        for word in set(words.findall(read_text(name, content))) & wanted
    ]


def test_all_arrives_and_nobody_is_named(
    prepared: Prepared,
    trained: Path,
    server: Backend,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = evaluate_copy(prepared, trained, tmp_path)
    assert f"W&B: {server.url}" in capsys.readouterr().err
    digest = read_manifest(str(prepared.store)).digest
    assert server.used == [f"dataset-{digest[:12]}", "model-the-run"]
    states = {made["name"]: made["state"] for made in server.artifacts.values()}
    assert set(states.values()) == {"COMMITTED"}
    assert "evaluation-the-run" in states
    assert server.unknown == []

    summary = json.loads(server.uploads["run/wandb-summary.json"])
    metrics = json.loads((run / "metrics.json").read_text())
    assert summary["eval/test/auroc"] == pytest.approx(metrics["test"]["auroc"]["value"])
    for key in ("eval/roc_table", "eval/predictions", "eval/report", "data/contact"):
        assert key in summary

    pictures = [c for n, c in server.uploads.items() if "/eval/gallery/" in n and n[-3:] == "png"]
    assert pictures
    (table,) = [c for c in server.uploads.values() if c[:4] == b"PAR1"]
    sent = Predictions.from_parquet(table)
    assert len(sent) == metrics["val"]["n"] + metrics["test"]["n"]
    assert np.nanmax(sent.age) <= 90

    kept = {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert find_identifiers(prepared, dict(server.uploads)) == []
    assert find_identifiers(prepared, {n: c for n, c in kept.items() if n[-3:] != ".pt"}) == []
    told = json.dumps([server.runs, server.artifacts, server.stream])
    assert find_identifiers(prepared, {"told": told.encode()}) == []
    named = next(iter(list_identifiers(prepared.source)))
    assert find_identifiers(prepared, {"a": f"<p>{named}</p>".encode()}) == [("a", named)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong key", "away", "uploads 403"])
def test_no_fault_of_the_server_matters(
    prepared: Prepared,
    trained: Path,
    server: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    if fault == "wrong key":
        monkeypatch.setenv("WANDB_API_KEY", "9" * 40)
    elif fault == "away":
        server.fault = "away"
    else:
        server.fault = "uploads 403"
    run = evaluate_copy(prepared, trained, tmp_path, "--evaluate.saliency", "false")
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    said = capsys.readouterr().err
    assert f"to send it: wandb sync '{log.parent}'" in said
    assert KEY not in said
    names = {r.artifact.name for r in read_records(log.read_bytes()) if r.HasField("artifact")}
    assert "evaluation-the-run" in names
