"""What the cluster is asked before a job."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from jobs import preflight
from pneumo.errors import StorageError


def test_places_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "1"
    (tmp_path / "manifest.json").write_text("{}")
    flags = ["--ray", version("ray"), "--reads", str(tmp_path), "--writes", str(run)]
    assert preflight.main(flags) == 0
    assert f"reached {tmp_path}, {run}" in capsys.readouterr().err
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reads", "/nowhere/store"], "/nowhere/store: nothing is there"),
        (["--writes", "/proc/version/run"], "/proc/version/run: /proc/version cannot be written"),
        (["--ray", "1.0.0"], "holds Ray 2."),
        (["--reads", "gopher://x"], "unknown scheme"),
        (["--needs", "PATH", "--needs", "NO_SUCH"], "NO_SUCH: not set on the cluster"),
    ],
)
def test_places_that_are_not(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight.main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: preflight: ")
    assert message in line


def test_a_place_that_says_nothing_is_not_waited_for() -> None:
    with silent_place() as ask, pytest.raises(StorageError) as raised:
        preflight.run_checks(0.1, [("s3://b", ask)])
    assert re.search(r"s3://b: no answer within 0\.1 s.*AWS_ENDPOINT_URL", str(raised.value))


def test_only_s3_has_its_endpoint_blamed() -> None:
    with silent_place() as ask, pytest.raises(StorageError) as raised:
        preflight.run_checks(0.1, [("gs://b", ask)])
    assert "AWS" not in str(raised.value)


@contextmanager
def silent_place() -> Iterator[Callable[[str], None]]:
    """A check that does not return before the test has gone on."""
    goes_on = threading.Event()

    def ask(url: str) -> None:
        goes_on.wait()

    yield ask
    goes_on.set()


def test_a_place_that_is_read_and_written_is_looked_at_for_both() -> None:
    asked = []
    checks = [
        ("/b", lambda url: asked.append(("reads", url))),
        ("/b", lambda url: asked.append(("writes", url))),
    ]
    preflight.run_checks(5.0, checks)
    assert sorted(asked) == [("reads", "/b"), ("writes", "/b")]
