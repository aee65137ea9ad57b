"""The files of the checkout that are sent to the cluster: the code that a job runs, nothing else.

Two packages are listed to be sent, which is safer than listing what to leave out: data, runs, the
virtual environment, wandb folders and whatever else is in a checkout are never sent.
"""

import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pneumo.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("pneumo", "jobs")
"""The packages that a job imports."""

SECRET_LIKE = (
    ".*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.token", "id_rsa*", "id_ed25519*",
    "*secret*", "*credential*", "*password*", "kaggle.json",
)  # fmt: skip
"""Patterns of names (in lower case) that are never sent, in whatever folder."""

CACHE_LIKE = ("__pycache__", "*.pyc", "*.pyo", "wandb", "*.egg-info")

MAX_BYTES = 100 * 2**20
"""Code is smaller than this. Ray keeps packages in the head's memory, and refuses 500 MiB."""


@dataclass(frozen=True)
class Package:
    """Files to send.

    `files` and `left_out` are relative to `root`, sorted; `left_out` are links and likely secrets;
    `size_bytes` is the size of `files` before compression.
    """

    root: Path
    files: tuple[Path, ...]
    left_out: tuple[Path, ...]
    size_bytes: int

    def __str__(self) -> str:
        text = f"{len(self.files)} files, {self.size_bytes / 2**20:.2f} MiB before compression"
        if self.left_out:
            names = ", ".join(map(str, self.left_out[:3])) + (", …" if self.left_out[3:] else "")
            text += f"; left out as links or likely secrets: {names}"
        return text


def collect(root: Path = CHECKOUT) -> Package:
    """The files to send of a checkout. Raises ConfigError if a package is missing or too large."""
    missing = [room for room in ROOMS if not (root / room).is_dir()]
    if missing:
        raise ConfigError(f"cluster: {root} holds no {'/, no '.join(missing)}/; run in a checkout")
    files: list[Path] = []
    left_out: list[Path] = []
    for room in ROOMS:
        _walk(root, Path(room), files, left_out)
    sizes = {path: (root / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = max(files, key=sizes.__getitem__)
        raise ConfigError(
            f"cluster: {root}: the code to send is {total / 2**20:.0f} MiB, at most "
            f"{MAX_BYTES // 2**20} are allowed; move data out of it, the largest is {largest}"
        )
    return Package(root, tuple(sorted(files)), tuple(sorted(left_out)), total)


def stage(package: Package, folder: Path) -> None:
    """Copy the files to send into `folder`."""
    for path in package.files:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.root / path, target)


def _walk(root: Path, folder: Path, files: list[Path], left_out: list[Path]) -> None:
    for entry in (root / folder).iterdir():
        path = folder / entry.name
        if _matches(entry.name, CACHE_LIKE):
            continue
        if entry.is_symlink() or _matches(entry.name, SECRET_LIKE):
            left_out.append(path)
        elif entry.is_dir():
            _walk(root, path, files, left_out)
        elif entry.is_file():
            files.append(path)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)
