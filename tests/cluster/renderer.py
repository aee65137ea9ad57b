"""Whether this machine can render a kustomization."""

import lzma
import os
import shutil
import tempfile
from pathlib import Path

from cluster.kuberay import overlays
from pneumo.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared"
"""The tools and data beside the checkout, where there are any."""
_PACKED = SHARED / "bin" / "hyperkube.xz"
"""All of Kubernetes' programs in one."""


def _lack() -> str:
    try:
        overlays.find_renderer()
    except ConfigError as error:
        if not _PACKED.is_file():
            return str(error)
        _unpack(Path(tempfile.gettempdir()) / f"pneumo-kubectl-{os.getuid()}")
    return ""


def _unpack(folder: Path) -> None:
    """Have kubectl in the folder, once for all sessions, and on this process's PATH."""
    if not (folder / "kubectl").exists():
        folder.mkdir(exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=folder, delete=False) as target,
            lzma.open(_PACKED) as source,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        Path(target.name).chmod(0o755)
        Path(target.name).replace(folder / "kubectl")  # at once: other processes do the same
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


NO_RENDERER = _lack()
"""Why not; "" where it can."""
