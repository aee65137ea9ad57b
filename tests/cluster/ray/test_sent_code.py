"""Which files travel."""

from pathlib import Path

import pytest

from cluster.ray import sent_code
from pneumo.errors import ConfigError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in (
        "pneumo/train.py", "pneumo/report.html", "pneumo/__pycache__/train.pyc",
        "jobs/train.py", "jobs/recipes/fast.toml", "jobs/.env", "jobs/wandb/run.log",
        "jobs/server.PEM", "pneumo/kaggle.json", "pneumo/aws_credentials.txt",
        ".git/config", ".venv/x.py", "data/a.dcm", "runs/1/best.pt", "tests/x.py", "secret.txt",
    ):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("12345")
    return root


def test_only_code_travels(checkout: Path) -> None:
    sent = sent_code.collect(checkout)
    assert [str(path) for path in sent.files] == [
        "jobs/recipes/fast.toml",
        "jobs/train.py",
        "pneumo/report.html",
        "pneumo/train.py",
    ]
    assert sent.size_bytes == 20
    assert [path.name for path in sent.left_out] == [
        ".env", "server.PEM", "aws_credentials.txt", "kaggle.json",
    ]  # fmt: skip
    assert "4 files" in str(sent)
    assert "left out" in str(sent)


def test_a_link_does_not_lead_out_of_the_checkout(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "private.py").write_text("x")
    (checkout / "jobs" / "link.py").symlink_to(tmp_path / "private.py")
    (checkout / "jobs" / "folder").symlink_to(tmp_path)
    sent = sent_code.collect(checkout)
    assert not [path for path in sent.files if "link" in path.name or "folder" in path.parts]
    assert {"link.py", "folder"} <= {path.name for path in sent.left_out}


def test_staging_copies_what_is_sent(checkout: Path, tmp_path: Path) -> None:
    sent = sent_code.collect(checkout)
    sent_code.stage(sent, tmp_path / "out")
    staged = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    assert staged == {*sent.files}


def test_data_among_the_code_is_refused(checkout: Path) -> None:
    with (checkout / "pneumo" / "weights.pt").open("wb") as file:
        file.truncate(sent_code.MAX_BYTES)
    with pytest.raises(ConfigError, match=r"at most 100 are allowed.*pneumo/weights\.pt"):
        sent_code.collect(checkout)


def test_elsewhere_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no pneumo/, no jobs/; run in a checkout"):
        sent_code.collect(tmp_path)


def test_this_checkout_is_small() -> None:
    assert sent_code.collect().size_bytes < 5 * 2**20
