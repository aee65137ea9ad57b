"""Check, before slow imports, that a Ray cluster answers where RAY_ADDRESS says.

Ray itself waits for half a minute to some minutes, and prints its internals meanwhile.
"""

import os
import socket
from urllib.parse import urlsplit

from pneumo.errors import ClusterError, ConfigError

_CONNECT_TIMEOUT_S = 10.0


def check_ray_address() -> None:
    """Raise ConfigError for a RAY_ADDRESS with which no job can start a Ray session, and
    ClusterError where no server accepts a connection."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "auto", "local"):
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: jobs are submitted there: use `python -m cluster submit`"
        )
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address}: a job cannot run through Ray Client; submit it: `python -m "
            "cluster submit --address http://HOST:8265`"
        )
    try:
        url = urlsplit(f"//{address}")
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(
            f"RAY_ADDRESS={address}: expected HOST:PORT of a head node (6379 by default), auto or "
            "local"
        )
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: cannot connect to {host}, port {port}: "
            f"{error.strerror or error}; is the cluster up? Without RAY_ADDRESS the job runs here"
        ) from error
