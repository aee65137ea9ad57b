"""Find an overlay of k8s/overlays, and render its kustomization to documents.

`kubectl`, which has kustomize built in, or `kustomize` renders it. A laptop that submits to
Kubernetes has one of them; a renderer of our own would be right only for some overlays.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pneumo.errors import ConfigError

Document = dict[str, Any]

OVERLAYS = Path(__file__).resolve().parents[2] / "k8s" / "overlays"

OLDEST_KUBECTL = (1, 27)
"""The kustomize of older versions lacks features that k8s/ uses; Debian 12 has 1.20."""
_TIMEOUT_S = 60.0


def find_overlay(name: str | None, folder: Path = OVERLAYS) -> Path:
    """The folder of an overlay: one of k8s/overlays by name, or any kustomization by path."""
    names = sorted(path.parent.name for path in folder.glob("*/kustomization.yaml"))
    for path in () if name is None else (folder / name, Path(name).expanduser()):
        if (path / "kustomization.yaml").is_file():
            return path
    got = "--overlay is required with --target k8s" if name is None else f"no overlay '{name}'"
    raise ConfigError(
        f"cluster: {got}; give one of {', '.join(names)}, or the folder of your own kustomization"
    )


def render(folder: Path) -> list[Document]:
    """The documents of the kustomization in `folder`. Raises ConfigError where that fails."""
    command = find_renderer()
    try:
        done = subprocess.run(
            [*command, str(folder)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"cluster: {' '.join(command)} {folder} took over {_TIMEOUT_S:g} s; does it refer to "
            "something on the network?"
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise ConfigError(f"cluster: {' '.join(command)} {folder}: {reason}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def find_renderer() -> tuple[str, ...]:
    """The command that renders a folder. Raises ConfigError where none is installed."""
    oldest = ".".join(map(str, OLDEST_KUBECTL))
    found = _kubectl_version() if shutil.which("kubectl") else None
    if found is not None and found >= OLDEST_KUBECTL:
        return ("kubectl", "kustomize")
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    got = (
        "neither kubectl nor kustomize is on PATH"
        if found is None
        else f"kubectl {'.'.join(map(str, found))} is too old to render k8s/, and no kustomize is "
        "on PATH"
    )
    raise ConfigError(
        f"cluster: {got}; install one of them (kubectl {oldest} or later), it renders the manifests"
    )


def _kubectl_version() -> tuple[int, ...]:
    done = subprocess.run(
        ["kubectl", "version", "--client", "--output", "json"],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    try:
        version = json.loads(done.stdout)["clientVersion"]
        return tuple(int(re.sub(r"\D", "", version[part])) for part in ("major", "minor"))
    except (ValueError, KeyError, TypeError):
        return (0, 0)
