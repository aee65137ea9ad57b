"""What a checkpoint file is made of: tensors copied to the CPU, bytes, versions."""

import io
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def to_bytes(state: dict[str, Any]) -> bytes:
    """The bytes of torch.save, through a file in memory (Linux's memfd).

    torch releases the GIL while it writes to a file. With a BytesIO it holds the GIL, and training
    steps at the same time take 2.5 times as long on the host.
    """
    # Other systems have no memfd, and a limit on file sizes applies to it too.
    with (
        suppress(AttributeError, OSError, RuntimeError),
        os.fdopen(os.memfd_create("checkpoint"), "rb", buffering=0) as file,
    ):
        torch.save(state, f"/proc/self/fd/{file.fileno()}")
        return file.read()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def copy_to_cpu(state: Any) -> Any:
    """A state dict of tensors, lists and plain values, its tensors copied to the CPU."""
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copy_to_cpu(value) for name, value in state.items()}
    if isinstance(state, list):
        return [copy_to_cpu(value) for value in state]
    return state


def describe_versions() -> dict[str, str]:
    """Versions of Python and torch, and of torchvision, Ray and CUDA where they are installed."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("torchvision", "ray"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
