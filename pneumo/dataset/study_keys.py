"""Keyed hashes in place of identifiers: who has the secret can link them, and nobody else."""

import hmac
import logging
import secrets
import stat
from collections.abc import Mapping

from blake3 import blake3

from pneumo import storage
from pneumo.errors import AccessError, SourceError, StorageError

_logger = logging.getLogger(__name__)

PRIVATE_FOLDER = ".pneumo"
HASH_KEY_VARIABLE = "PNEUMO_HASH_KEY"
SECRET_CHECK = "secret_check.txt"
"""By it two stores know whether one secret made their keys, so that shared patients are found."""


def read_hash_key(source_url: str, environ: Mapping[str, str]) -> bytes:
    """The secret behind study keys: PNEUMO_HASH_KEY, or `.pneumo/hash_key` beside the source, made
    on first use with mode 600. Who loses it gets other keys from the same source.

    Raises SourceError. Warns where others can read the file.
    """
    if environ.get(HASH_KEY_VARIABLE):
        return environ[HASH_KEY_VARIABLE].encode()
    if not storage.is_local(source_url):
        raise SourceError(f"{source_url}: set {HASH_KEY_VARIABLE} to a secret; keys derive from it")
    path = storage.local_path(source_url) / PRIVATE_FOLDER / "hash_key"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():  # of two jobs at once one wins
            storage.create_bytes(str(path), secrets.token_hex(32).encode(), mode=0o600)
        hash_key = path.read_text().strip().encode()
    except (OSError, AccessError, StorageError) as error:
        raise SourceError(
            f"{path}: cannot be made or read; make it writable, or set {HASH_KEY_VARIABLE} to a "
            "secret"
        ) from error
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        what = "others can read the secret behind the study keys; chmod 600 it"
        _logger.warning("%s: mode %03o: %s", path, mode, what)
    if not hash_key:
        raise SourceError(f"{path}: empty; delete it, or set {HASH_KEY_VARIABLE} to a secret")
    return hash_key


def find_hash_key(source_url: str, environ: Mapping[str, str]) -> bytes:
    """The secret of a source that was prepared before; none is made. Raises SourceError."""
    is_made = not storage.is_local(source_url) or storage.exists(
        storage.join(source_url, PRIVATE_FOLDER, "hash_key")
    )
    if not is_made and not environ.get(HASH_KEY_VARIABLE):
        raise SourceError(
            f"{source_url}: no {PRIVATE_FOLDER}/hash_key, so nothing was prepared from it with a "
            f"secret of its own; set {HASH_KEY_VARIABLE} to the one that was used"
        )
    return read_hash_key(source_url, environ)


def derive_file_key(hash_key: bytes) -> bytes:
    """The 32-byte key of the BLAKE3 hash `source_blake3` of a DICOM file: a plain hash would tell
    the study's key to whoever has the file."""
    return blake3(hash_key, derive_key_context="pneumo 2026-11-26 DICOM files").digest()


def derive_key(hash_key: bytes, kind: str, identifier: str) -> str:
    """The keyed hash of an identifier of a `kind` (study, patient), 20 hex digits."""
    return hmac.digest(hash_key, f"{kind}:{identifier}".encode(), "sha256").hex()[:20]


def derive_secret_check(hash_key: bytes) -> str:
    """16 hex digits by which two stores know that their keys come from one secret."""
    return derive_key(hash_key, "check", "one secret")[:16]
