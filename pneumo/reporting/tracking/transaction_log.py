"""The .wandb file that W&B replays: read, its staged files found anew, written again.

A LevelDB log: after 7 bytes of its own, blocks of 32 KiB; a record is cut into pieces that end with
a block, each after a header of checksum, length and kind. Records are protobufs of wandb's. Those
of artifacts name their files by absolute paths, so a run's folder that was moved or fetched has
lost them, and `wandb sync` says nothing of it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pneumo.errors import TrackingError

_FILE_HEADER = struct.Struct("<4sHB")
_MAGIC = (b":W&B", 0xBEE1)
_PIECE_HEADER = struct.Struct("<IHB")
_BLOCK_BYTES = 32 * 1024
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def relocate(data: bytes, root: Path) -> bytes:
    """The log with every staged file where it now lies below `root`, the run's folder `wandb`.

    Raises TrackingError where one lies nowhere there, or `data` is no log.
    """
    records = []
    for record in read_records(data):
        for entry in record.artifact.manifest.contents:
            if entry.local_path:
                entry.local_path = str(_find(entry.local_path, root))
        records.append(record)
    return write_records(records)


def _find(recorded: str, root: Path) -> Path:
    """The file below `root` that was recorded below another folder `wandb`."""
    parts = Path(recorded).parts
    for at, part in enumerate(parts):
        found = root.joinpath(*parts[at + 1 :])
        if part == root.name and found.is_file():
            return found
    raise TrackingError(
        f"{root}: {'/'.join(parts[-4:])} is not there, which an artifact needs; fetch the run's "
        "whole folder wandb"
    )


def read_records(data: bytes) -> Iterator[Any]:
    """The records of a .wandb file; what a killed process left unfinished at its end is left out.

    Raises TrackingError for another file, or a damaged one.
    """
    from wandb.proto import wandb_internal_pb2

    kind: Any = wandb_internal_pb2  # its classes are made when it is imported
    for body in _read_bodies(data):
        record = kind.Record()
        record.ParseFromString(body)
        yield record


def _read_bodies(data: bytes) -> Iterator[bytes]:
    if len(data) < _FILE_HEADER.size or _FILE_HEADER.unpack_from(data)[:2] != _MAGIC:
        raise TrackingError("a .wandb file begins otherwise; was it fetched whole?")
    at, body = _FILE_HEADER.size, b""
    while at + _PIECE_HEADER.size <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _PIECE_HEADER.size:
            at += left
            continue
        checksum, length, kind = _PIECE_HEADER.unpack_from(data, at)
        at += _PIECE_HEADER.size
        piece = data[at : at + length]
        if len(piece) < length:
            return
        if checksum != _checksum(kind, piece):
            raise TrackingError(f"a .wandb file is damaged at byte {at}; fetch it again")
        at += length
        body = piece if kind in (_WHOLE, _FIRST) else body + piece
        if kind in (_WHOLE, _LAST):
            yield body


def write_records(records: Iterable[Any]) -> bytes:
    """The .wandb file of some records."""
    data = bytearray(_FILE_HEADER.pack(*_MAGIC, 0))
    for record in records:
        _append(data, record.SerializeToString())
    return bytes(data)


def _append(data: bytearray, body: bytes) -> None:
    """A record as pieces, each with a header and none across the end of a block."""
    start, is_first = 0, True
    while is_first or start < len(body):
        left = _BLOCK_BYTES - len(data) % _BLOCK_BYTES
        if left < _PIECE_HEADER.size:
            data.extend(bytes(left))
            left = _BLOCK_BYTES
        piece = body[start : start + left - _PIECE_HEADER.size]
        start += len(piece)
        is_last = start == len(body)
        kind = {(True, True): _WHOLE, (True, False): _FIRST, (False, True): _LAST}.get(
            (is_first, is_last), _MIDDLE
        )
        data.extend(_PIECE_HEADER.pack(_checksum(kind, piece), len(piece), kind) + piece)
        is_first = False


def _checksum(kind: int, piece: bytes) -> int:
    return zlib.crc32(piece, zlib.crc32(bytes([kind])))
