"""The mode of W&B: online, offline or disabled."""

import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pneumo.config import TrackingConfig

Mode = Literal["online", "offline", "disabled"]

_MODES: tuple[Mode, ...] = ("online", "offline", "disabled")
"""From the least private to the most."""
CLOUD_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Servers whose login in the netrc file counts without WANDB_BASE_URL."""


def choose_mode(config: TrackingConfig, environ: Mapping[str, str]) -> Mode:
    """The mode of `config.mode` in this environment.

    auto is online with a key (WANDB_API_KEY or a login in the netrc file) and offline without.
    WANDB_MODE replaces auto; where both are explicit, the more private of the two is used.
    """
    mode: Mode = _default_mode(environ) if config.mode == "auto" else config.mode
    wanted = {"dryrun": "offline", "run": "online"}.get(
        environ.get("WANDB_MODE", ""), environ.get("WANDB_MODE")
    )
    for candidate in _MODES:
        if candidate == wanted:
            return candidate if config.mode == "auto" else max(mode, candidate, key=_MODES.index)
    return mode


def _default_mode(environ: Mapping[str, str]) -> Mode:
    if environ.get("WANDB_API_KEY"):
        return "online"
    base_url = environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(base_url).netloc] if base_url else CLOUD_HOSTS
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        logins = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any(logins.authenticators(host) for host in hosts) else "offline"
