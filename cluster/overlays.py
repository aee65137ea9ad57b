"""A kustomization of k8s/overlays as the documents that it renders to.

kustomize itself renders: `kubectl`, which has it built in, or `kustomize`. A laptop that submits to
Kubernetes has one of them; a renderer of our own would be right only for some overlays.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pneumo.errors import ConfigError

Document = dict[str, Any]

OVERLAYS = Path(__file__).resolve().parents[1] / "k8s" / "overlays"

_TOOLS = (("kubectl", ("kubectl", "kustomize")), ("kustomize", ("kustomize", "build")))
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
    """The documents of the kustomization in `folder`. Raises ConfigError when it cannot be had."""
    command = next((command for tool, command in _TOOLS if shutil.which(tool)), None)
    if command is None:
        raise ConfigError(
            "cluster: neither kubectl nor kustomize is on PATH; install one of them (kubectl 1.27 "
            "or later), it renders the manifests"
        )
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
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ConfigError(f"cluster: {' '.join(command)} {folder}: {why}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]
