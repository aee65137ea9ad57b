"""Code says which it is: by the environment, else by git, else by its version alone."""

import subprocess
from pathlib import Path

from pneumo import __version__
from pneumo.version import REVISION, describe, describe_code, find_revision


def test_what_the_environment_says_wins(tmp_path: Path) -> None:
    assert describe(tmp_path, {REVISION: "abc1234"}) == f"{__version__}+abc1234"


def test_a_copy_without_git_is_known_by_its_version(tmp_path: Path) -> None:
    assert describe(tmp_path, {}) == __version__


def test_a_checkout_is_known_by_its_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    commit = git("rev-parse", "HEAD")
    assert commit.startswith(revision := find_revision(tmp_path))
    assert revision
    (tmp_path / "file").write_text("b")
    assert describe(tmp_path, {}).endswith("-dirty")
    # Installed in the virtual environment of another project: its commit is not ours.
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    (installed / "code.py").touch()
    assert describe(installed, {}) == __version__


def test_this_code_knows_its_version() -> None:
    assert describe_code().split("+")[0] == __version__
    assert describe_code.cache_info().misses == 1
