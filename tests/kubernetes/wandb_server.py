"""The fake W&B server of the tools beside the checkout, on an address that pods reach."""

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.kubernetes.cluster import TOOLS


@contextmanager
def running_wandb(host: str) -> Iterator[tuple[str, Any]]:
    """Its URL, and what it received; skips the test where the tools are absent."""
    path = TOOLS / "fake_wandb.py"
    if not path.is_file():
        pytest.skip(f"no {path}")
    spec = importlib.util.spec_from_file_location("fake_wandb", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    state = tool.State()
    state.viewer_401 = True
    server = tool.Srv((host, 0), type("Handler", (tool.H,), {"S": state}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
