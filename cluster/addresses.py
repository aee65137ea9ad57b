"""Addresses of Ray dashboards and other servers."""

from urllib.parse import urlsplit

from pneumo.errors import ConfigError

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_remote(address: str) -> bool:
    """Whether `http://host:port` is another machine; a forwarded port counts as this one.

    Raises ConfigError for a malformed address.
    """
    try:
        host = urlsplit(address).hostname
    except ValueError as error:
        raise ConfigError(f"{address}: is no address: {error}") from error
    return (host or "") not in _LOOPBACK
