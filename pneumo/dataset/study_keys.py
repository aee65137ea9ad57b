"""Keyed hashes in place of identifiers: only who has the secret can link them to patients."""

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
_SHORT_SECRET = 16
"""A shorter secret, in characters, is warned of; refused, older stores could not be made again."""
SECRET_CHECK = "secret_check.txt"
"""A file in a store: equal in two stores whose keys come from one secret, so that shared patients
can be found."""


def read_hash_key(source_url: str, environ: Mapping[str, str]) -> bytes:
    """The secret for the keys: PNEUMO_HASH_KEY, or `.pneumo/hash_key` beside the source, created on
    first use with mode 600. With another secret the same source gets other keys.

    Raises SourceError. Warns where other users can read the file, and of a secret that is short.
    """
    if secret := environ.get(HASH_KEY_VARIABLE):
        if len(secret) < _SHORT_SECRET:
            _logger.warning(
                "%s has only %d characters: whoever guesses it can tell from the keys which "
                "patients are in a store; for a new one take: openssl rand -hex 32",
                HASH_KEY_VARIABLE,
                len(secret),
            )
        return secret.encode()
    if not storage.is_local(source_url):
        raise SourceError(f"{source_url}: set {HASH_KEY_VARIABLE} to a secret; keys derive from it")
    path = storage.local_path(source_url) / PRIVATE_FOLDER / "hash_key"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():  # of two concurrent jobs one creates it
            storage.create_bytes(str(path), secrets.token_hex(32).encode(), mode=0o600)
        hash_key = path.read_bytes().strip()  # not text, where it was made by /dev/urandom
    except (OSError, AccessError, StorageError) as error:
        raise SourceError(
            f"{path}: cannot be created or read; make it writable, or set {HASH_KEY_VARIABLE} to a "
            "secret"
        ) from error
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        what = "other users can read the secret of the study keys; run chmod 600 on it"
        _logger.warning("%s: mode %03o: %s", path, mode, what)
    if not hash_key:
        raise SourceError(f"{path}: empty; delete it, or set {HASH_KEY_VARIABLE} to a secret")
    return hash_key


def find_hash_key(source_url: str, environ: Mapping[str, str]) -> bytes:
    """The secret of a source that was prepared before; never creates one. Raises SourceError."""
    may_exist = not storage.is_local(source_url) or storage.exists(
        storage.join(source_url, PRIVATE_FOLDER, "hash_key")
    )
    if not may_exist and not environ.get(HASH_KEY_VARIABLE):
        raise SourceError(
            f"{source_url}: no {PRIVATE_FOLDER}/hash_key, so nothing was prepared from it with a "
            f"secret of its own; set {HASH_KEY_VARIABLE} to the one that was used"
        )
    return read_hash_key(source_url, environ)


def derive_file_key(hash_key: bytes) -> bytes:
    """The 32-byte key of `StudyRow.source_blake3`: with an unkeyed hash, everybody who has the
    DICOM file could find the study's key."""
    return blake3(hash_key, derive_key_context="pneumo 2026-11-26 DICOM files").digest()


def derive_key(hash_key: bytes, kind: str, identifier: str) -> str:
    """The keyed hash of an identifier of a `kind` (study, patient), 20 hex digits."""
    text = f"{kind}:{identifier}".encode(
        errors="surrogatepass"
    )  # of a file's name that is no UTF-8
    return hmac.digest(hash_key, text, "sha256").hex()[:20]


def derive_secret_check(hash_key: bytes) -> str:
    """16 hex digits; equal for two stores whose keys come from one secret."""
    return derive_key(hash_key, "check", "one secret")[:16]
