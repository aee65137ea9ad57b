"""Whether this machine can render a kustomization."""

from __future__ import annotations

from cluster import overlays
from pneumo.errors import ConfigError


def _lack() -> str:
    try:
        overlays.find_renderer()
    except ConfigError as error:
        return str(error)
    return ""


NO_RENDERER = _lack()
"""Why not; "" where it can."""
