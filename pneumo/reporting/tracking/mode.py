"""The mode of W&B: online, offline or disabled."""

import configparser
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
"""Servers whose login in the netrc file counts where no server is named."""
_SAVED = ("base_url", "entity", "mode")
"""What is taken from the settings files of the `wandb` command."""


def choose_mode(config: TrackingConfig, environ: Mapping[str, str]) -> Mode:
    """The mode of `config.mode` in this environment.

    auto is online with a key (WANDB_API_KEY or a login in the netrc file) and offline without.
    WANDB_MODE replaces auto; where both are explicit, the more private of the two is used.
    """
    environ = add_saved_settings(environ)
    mode: Mode = _default_mode(environ) if config.mode == "auto" else config.mode
    wanted = {"dryrun": "offline", "run": "online"}.get(
        environ.get("WANDB_MODE", ""), environ.get("WANDB_MODE")
    )
    for candidate in _MODES:
        if candidate == wanted:
            return candidate if config.mode == "auto" else max(mode, candidate, key=_MODES.index)
    return mode


def add_saved_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with the server, entity and mode that `wandb login --host`, `wandb init` and
    `wandb offline` have saved, where it has none. What cannot be read counts as offline."""
    folder = environ.get("WANDB_CONFIG_DIR") or _home(environ) / ".config" / "wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([Path(folder).expanduser() / "settings", "wandb/settings", ".wandb/settings"])
    except (configparser.Error, UnicodeDecodeError):
        return {**environ, "WANDB_MODE": "offline"}
    saved = {name: parser.get("default", name, fallback="") for name in _SAVED}
    return {f"WANDB_{name.upper()}": text for name, text in saved.items() if text} | {**environ}


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME", "~")).expanduser()


def _default_mode(environ: Mapping[str, str]) -> Mode:
    if environ.get("WANDB_API_KEY"):
        return "online"
    base_url = environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(base_url).netloc] if base_url else CLOUD_HOSTS
    path = Path(environ.get("NETRC") or _home(environ) / ".netrc")
    try:
        logins = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return "offline"
    return "online" if any(logins.authenticators(host) for host in hosts) else "offline"
