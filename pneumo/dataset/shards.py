"""The store's format, owned here: samples in tar shards, and the manifest that vouches for them.

A sample is two WebDataset members, `<key>.npy` (uint8 (S, S)) and `<key>.cls` (the target in
ASCII). Who the study is (patient group, age, boxes) stands in studies.parquet, not in the shards.
The manifest is written last; without it a store is not there.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pneumo import storage
from pneumo.dataset.manifest import BlockEntry, ShardEntry, naming_file
from pneumo.errors import DataError

SHARD_SUFFIX = ".tar"


BLOCK_SAMPLES = 64
"""Neighbours in a shard that are read and shuffled together: one range request of 3.3 MB at 224
px. Of large pictures they are fewer."""


SHARD_SAMPLES = 512
"""Samples in a shard: 27 MB at 224 px, one PUT; all of RSNA makes 53, enough to share out. Of large
pictures they are fewer."""


_BLOCK_BYTES = 4_300_000


_SHARD_BYTES = 27_000_000


_CHECKSUM_AT = 148
"""Where a tar header has its checksum: six octal digits and a zero."""


@dataclass(frozen=True)
class Sample:
    """One study in a shard."""

    key: str
    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8, 0 = black."""
    target: int


def sample_bytes(image_size: int) -> int:
    """What a sample takes in a shard: two headers, the target, and the picture."""
    picture = len(_npy_header((image_size, image_size))) + image_size**2
    return 3 * tarfile.BLOCKSIZE + picture + -picture % tarfile.BLOCKSIZE


def block_samples(image_size: int) -> int:
    """Samples in a full block: BLOCK_SAMPLES, or as many as make about 4 MB."""
    return max(1, min(BLOCK_SAMPLES, _BLOCK_BYTES // sample_bytes(image_size)))


def shard_samples(image_size: int) -> int:
    """Samples in a full shard, unless told otherwise: SHARD_SAMPLES, or as many as make 27 MB."""
    return max(1, min(SHARD_SAMPLES, _SHARD_BYTES // sample_bytes(image_size)))


def encode_shard(name: str, samples: Iterable[Sample]) -> tuple[ShardEntry, bytes]:
    """The tar of `samples`, in their order, and what the manifest will say of it.

    Equal samples give equal bytes. They are taken one at a time, so only the tar is in memory.
    """
    buffer = io.BytesIO()
    entry = _encode_shard(buffer, name, samples)
    return entry, buffer.getvalue()


def _encode_shard(buffer: io.BytesIO, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """`encode_shard` into the first bytes of `buffer`, whose content is of no account.

    All is hashed as it is written: later it would have to come back from memory, for twice the
    time.
    """
    buffer.seek(0)
    whole, part = hashlib.sha256(), blake3()
    blocks = list[BlockEntry]()
    start = count = counted = positives = 0
    in_block = BLOCK_SAMPLES

    def end_block() -> None:
        nonlocal start, counted, part
        if count > counted:
            end = buffer.tell()
            blocks.append(
                BlockEntry(
                    offset=start,
                    bytes=end - start,
                    samples=count - counted,
                    blake3=part.hexdigest(),
                )
            )
            start, counted, part = end, count, blake3()

    for sample in samples:
        if not count:
            in_block = block_samples(len(sample.pixels))
        for content in _encode_sample(sample):
            buffer.write(content)
            whole.update(content)
            part.update(content)
        count += 1
        positives += sample.target
        if count % in_block == 0:
            end_block()
    end_block()
    end_marker = bytes(2 * tarfile.BLOCKSIZE)
    buffer.write(end_marker)
    whole.update(end_marker)
    return ShardEntry(
        name=name,
        samples=count,
        positives=positives,
        bytes=buffer.tell(),
        sha256=whole.hexdigest(),
        blocks=tuple(blocks),
    )


def _encode_sample(sample: Sample) -> Iterator[bytes | memoryview]:
    """Its members of the tar, in the order of webdataset's own writer."""
    target = str(sample.target).encode()
    label = _encode_header(f"{sample.key}.cls", len(target)) + target + _padding(len(target))
    header = _npy_header(sample.pixels.shape, sample.pixels.dtype.str)
    pixels = np.ascontiguousarray(sample.pixels).reshape(-1).view(np.uint8).data
    size = len(header) + pixels.nbytes
    yield label + _encode_header(f"{sample.key}.npy", size) + header
    yield pixels
    yield _padding(size)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _encode_header(name: str, size: int) -> bytes:
    """What tarfile makes of a file without time, owner and extended header, so that the bytes are
    the same every time; twenty times as fast: members differ in little but the name."""
    encoded = name.encode("ascii")
    assert len(encoded) <= tarfile.LENGTH_NAME, name
    nameless, checksum = _nameless_header(size)
    return b"".join(
        (
            encoded,
            nameless[len(encoded) : _CHECKSUM_AT],
            b"%06o\0" % (checksum + sum(encoded)),
            nameless[_CHECKSUM_AT + 7 :],
        )
    )


@lru_cache(maxsize=16)
def _nameless_header(size: int) -> tuple[bytes, int]:
    """The header of a member without a name, and the sum of its bytes, the sum itself aside."""
    info = tarfile.TarInfo()
    info.size, info.mode = size, 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, int(header[_CHECKSUM_AT : _CHECKSUM_AT + 6], 8)


@lru_cache(maxsize=16)
def _npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The first bytes of the .npy file of an image."""
    header = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def decode_shard(data: bytes, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard, checked against its entry. Raises DataError, naming the shard."""
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise DataError(
            f"shard {entry.name}: {len(data)} bytes, not the {entry.bytes} that the manifest "
            "vouches for, or changed since; delete the store and prepare it again"
        )
    yield from _decode_samples(data, entry, image_size)


def _decode_samples(data: bytes, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard whose digest is right.

    webdataset alone ends early and silently on a shard cut at a member's end; so the count and each
    sample's parts are checked here.
    """
    count = 0
    for group in _read_groups(data, entry):
        try:
            pixels = _decode_image(group["npy"], image_size).copy()
            target = int(group["cls"])
        except (KeyError, ValueError, EOFError) as error:
            raise DataError(f"shard {entry.name}: sample {count} does not decode") from error
        if pixels.shape != (image_size, image_size) or pixels.dtype != np.uint8:
            raise DataError(
                f"shard {entry.name}: sample {count} is {pixels.dtype} {pixels.shape}, expected "
                f"uint8 {(image_size, image_size)}"
            )
        count += 1
        yield Sample(str(group["__key__"]), pixels, target)
    if count != entry.samples:
        raise DataError(f"shard {entry.name}: {count} samples, the manifest says {entry.samples}")


def _decode_image(data: bytes | memoryview, image_size: int) -> npt.NDArray[Any]:
    """The array of a .npy file, a view of it; its header is not parsed where it is as we write it.

    np.load parses the header with `ast`, which fails at random in threads before Python 3.11.9
    (python/cpython#106905), and takes seven times as long.
    """
    header = _npy_header((image_size, image_size))
    if data[: len(header)] == header and len(data) == len(header) + image_size**2:
        pixels = np.frombuffer(data, np.uint8, offset=len(header))
        return pixels.reshape(image_size, image_size)
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def _read_groups(data: bytes, entry: ShardEntry) -> Iterator[dict[str, Any]]:
    # It imports torch, which whoever prepares a store has no use for: 2 s and 400 MB a process.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        yield from group_by_keys(
            tar_file_expander([{"url": entry.name, "stream": io.BytesIO(data)}])
        )
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"shard {entry.name}: not a readable tar") from error


def read_shard(store_url: str, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of one shard of a store. Raises DataError when it is missing or not as
    vouched."""
    with naming_file(f"shard {entry.name}", store_url):
        url = storage.join(store_url, entry.name)
        data = storage.read_bytes(url, sha256=entry.sha256, size=entry.bytes)
    return _decode_samples(data, entry, image_size)


def read_block(store_url: str, entry: ShardEntry, block: BlockEntry) -> bytes:
    """The bytes of one block of a shard, by one range request, checked against their digest.

    Raises DataError, naming the shard, when it is missing, cut or changed since its preparation.
    """
    with naming_file(f"shard {entry.name}", store_url):
        url = storage.join(store_url, entry.name)
        return storage.read_range(url, block.offset, block.bytes, blake3=block.blake3)


def decode_block(
    data: bytes, entry: ShardEntry, block: BlockEntry, image_size: int
) -> Iterator[Sample]:
    """The samples of a block, whose bytes the caller has compared with its digest.

    Their pixels are views of `data`, not to be written to. Raises DataError, naming the shard, when
    a sample does not decode or one is missing or too many.
    """
    where = f"shard {entry.name}, block at byte {block.offset}"
    members = list(_read_members(data, where))
    if len(members) != 2 * block.samples:
        raise DataError(
            f"{where}: {len(members)} members, the manifest says {block.samples} samples of two"
        )
    for i, (label, image) in enumerate(zip(members[::2], members[1::2], strict=True)):
        key = label.name.removesuffix(".cls")
        if (label.name, image.name) != (f"{key}.cls", f"{key}.npy"):
            raise DataError(f"{where}: sample {i} is not a .cls and a .npy of one key")
        try:
            pixels = _decode_image(image.content, image_size)
            target = int(bytes(label.content))
        except (ValueError, EOFError) as error:
            raise DataError(f"{where}: sample {i} does not decode") from error
        if pixels.shape != (image_size, image_size) or pixels.dtype != np.uint8:
            raise DataError(
                f"{where}: sample {i} is {pixels.dtype} {pixels.shape}, expected uint8 "
                f"{(image_size, image_size)}"
            )
        yield Sample(key, pixels, target)


class _Member(NamedTuple):
    name: str
    content: memoryview
    """Of the tar: nothing is copied."""


def _read_members(data: bytes, where: str) -> Iterator[_Member]:
    """The plain files in a tar as `encode_shard` writes it.

    webdataset's reader takes 90 us a sample under the interpreter's lock, more than all else that
    a stream does; this takes 5. The digest has vouched that these are the bytes that we wrote.
    """
    whole, position = memoryview(data), 0
    while position < len(data):
        header = data[position : position + tarfile.BLOCKSIZE]
        try:
            name, size = header[:100].rstrip(b"\0").decode("ascii"), int(header[124:135], 8)
        except ValueError as error:
            raise DataError(f"{where}: not a readable tar") from error
        start = position + tarfile.BLOCKSIZE
        if header[156:157] != tarfile.REGTYPE or start + size > len(data):
            raise DataError(f"{where}: not a readable tar")
        yield _Member(name, whole[start : start + size])
        position = start + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def write_shard(store_url: str, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Encode and publish one shard, if it has samples; the entry that the manifest will carry.

    `{digest}` in `name` becomes the first digits of its SHA-256: another content is then another
    shard, and never replaces one that a manifest vouches for.
    """
    buffer = _MEMORY.buffer
    entry = _encode_shard(buffer, name, samples)
    entry = entry.model_copy(update={"name": name.format(digest=entry.sha256[:12])})
    if entry.samples:
        with buffer.getbuffer() as memory, memory[: entry.bytes] as data:
            storage.write_bytes(storage.join(store_url, entry.name), data)
    return entry


class _Memory(threading.local):
    """Memory of a thread that one shard after the other is made in: fresh pages cost as much as
    writing to them does."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()


_MEMORY = _Memory()
