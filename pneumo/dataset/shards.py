"""Writing and reading shards: tar files of samples.

A sample is two WebDataset members, `<key>.cls` (the target in ASCII) and `<key>.npy` (uint8 (S,
S)). Patient, age, boxes and the like are in studies.parquet. The bytes are those of
`webdataset.TarWriter` without its padding at the end (a test compares them); webdataset itself is
not used to write, as it imports torch: 3 s and 440 MB in each task of a preparation, 16 times as
long as writing a shard.
"""

import hashlib
import io
import itertools
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from pneumo import storage
from pneumo.dataset.manifest import BlockEntry, ShardEntry, as_data_error
from pneumo.errors import DataError

SHARD_SUFFIX = ".tar"
BLOCK_SAMPLES = 64
"""Neighbouring samples of a shard that are read and shuffled together: one range request of 3.3 MB
at 224 px. Fewer for large images."""
SHARD_SAMPLES = 512
"""Samples in a shard: 27 MB at 224 px, one PUT; RSNA has 53 shards. Fewer for large images."""
_BLOCK_BYTES = 4_300_000
_SHARD_BYTES = 27_000_000


@dataclass(frozen=True)
class Sample:
    """One study in a shard."""

    key: str
    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8, 0 = black."""
    target: int


def sample_bytes(image_size: int) -> int:
    """Bytes of a sample in a shard: two headers, the target, and the image."""
    image = len(_npy_header((image_size, image_size))) + image_size**2
    return 3 * tarfile.BLOCKSIZE + image + -image % tarfile.BLOCKSIZE


def block_samples(image_size: int) -> int:
    """Samples in a full block: BLOCK_SAMPLES, or as many as make about 4 MB."""
    return max(1, min(BLOCK_SAMPLES, _BLOCK_BYTES // sample_bytes(image_size)))


def shard_samples(image_size: int) -> int:
    """Samples in a full shard: SHARD_SAMPLES, or as many as make 27 MB."""
    return max(1, min(SHARD_SAMPLES, _SHARD_BYTES // sample_bytes(image_size)))


def encode_shard(buffer: io.BytesIO, name: str, samples: Iterable[Sample]) -> ShardEntry:
    """Write the tar of `samples`, in their order; returns its entry of the manifest.

    Overwrites `buffer` from its start; the buffer may be longer than the tar. Equal samples give
    equal bytes. One block of samples is in memory at a time, and hashed while it is written.
    """
    buffer.seek(0)
    whole, blocks, positives = hashlib.sha256(), list[BlockEntry](), 0
    samples = iter(samples)
    for first in samples:
        block = [first, *itertools.islice(samples, block_samples(len(first.pixels)) - 1)]
        start, digest = buffer.tell(), blake3()
        for content in itertools.chain.from_iterable(map(_encode_sample, block)):
            buffer.write(content)
            whole.update(content)
            digest.update(content)
        blocks.append(
            BlockEntry(
                offset=start,
                bytes=buffer.tell() - start,
                samples=len(block),
                blake3=digest.hexdigest(),
            )
        )
        positives += sum(sample.target for sample in block)
    end_marker = bytes(2 * tarfile.BLOCKSIZE)
    buffer.write(end_marker)
    whole.update(end_marker)
    return ShardEntry(
        name=name,
        samples=sum(block.samples for block in blocks),
        positives=positives,
        bytes=buffer.tell(),
        sha256=whole.hexdigest(),
        blocks=tuple(blocks),
    )


def _encode_sample(sample: Sample) -> Iterator[bytes | memoryview]:
    """The sample's members of the tar, in the order of `webdataset.TarWriter`."""
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
    """A tar header without time and owner."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)


@lru_cache(maxsize=16)
def _npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The header of an image's .npy file."""
    header = io.BytesIO()
    description = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _decode_sample(
    key: str, image: bytes | memoryview, label: bytes | memoryview, image_size: int, where: str
) -> Sample:
    """The sample of a .npy and a .cls file; its pixels are a view of `image`.

    A header that equals ours is not parsed: np.load parses it with `ast`, which fails at random in
    threads before Python 3.11.9 (python/cpython#106905), and takes seven times as long. Raises
    DataError.
    """
    shape = (image_size, image_size)
    header = _npy_header(shape)
    try:
        if image[: len(header)] == header and len(image) == len(header) + image_size**2:
            pixels = np.frombuffer(image, np.uint8, offset=len(header)).reshape(shape)
        else:
            pixels = np.load(io.BytesIO(image), allow_pickle=False)
        target = int(bytes(label))
    except (ValueError, EOFError) as error:
        raise DataError(f"{where} does not decode") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{where} is {pixels.dtype} {pixels.shape}, expected uint8 {shape}")
    return Sample(key, pixels, target)


def read_shard(store_url: str, entry: ShardEntry, image_size: int) -> Iterator[Sample]:
    """The samples of a shard, which webdataset reads as a whole.

    Raises DataError, which names the shard, when it is missing or not what the manifest says, or
    when a sample does not decode.
    """
    where = f"shard {entry.name}"
    with as_data_error(where, store_url):
        url = storage.join(store_url, entry.name)
        data = storage.read_bytes(url, sha256=entry.sha256, size=entry.bytes)
    # Imported here, as it imports torch, which a preparation does not need.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    try:
        files = tar_file_expander([{"url": entry.name, "stream": io.BytesIO(data)}])
        for group in group_by_keys(files):
            sample = _decode_sample(
                group["__key__"],
                group.get("npy", b""),
                group.get("cls", b""),
                image_size,
                f"{where}: sample {count}",
            )
            yield replace(sample, pixels=sample.pixels.copy())  # writable
            count += 1
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{where}: not a readable tar") from error
    if count != entry.samples:  # a tar truncated between members raises no error
        raise DataError(f"{where}: {count} samples, the manifest says {entry.samples}")


def read_block(store_url: str, entry: ShardEntry, block: BlockEntry) -> bytes:
    """The bytes of one block of a shard, by one range request, checked against their digest.

    Raises DataError, which names the shard, when it is missing, truncated or changed.
    """
    with as_data_error(f"shard {entry.name}", store_url):
        url = storage.join(store_url, entry.name)
        return storage.read_range(url, block.offset, block.bytes, blake3=block.blake3)


def decode_block(
    data: bytes, entry: ShardEntry, block: BlockEntry, image_size: int
) -> Iterator[Sample]:
    """The samples of a block of bytes from `read_block`, which has checked their digest.

    Their pixels are read-only views of `data`. Raises DataError, which names the shard, when a
    sample does not decode or the number of samples is wrong.
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
        yield _decode_sample(key, image.content, label.content, image_size, f"{where}: sample {i}")


def read_blocks(
    store_url: str, blocks: Iterable[tuple[ShardEntry, BlockEntry]], image_size: int
) -> Iterator[Sample]:
    """The samples of some blocks, one block read at a time. Raises as `read_block`."""
    for entry, block in blocks:
        yield from decode_block(read_block(store_url, entry, block), entry, block, image_size)


class _Member(NamedTuple):
    name: str
    content: memoryview
    """A view of the tar, not a copy."""


def _read_members(data: bytes, where: str) -> Iterator[_Member]:
    """The regular files of a tar written by `encode_shard`; its digest was checked before.

    webdataset's reader takes 90 us a sample while it holds the GIL, more than the rest of
    streaming; this takes 5.
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
    """Encode and write one shard, if it has samples; returns its entry of the manifest.

    `{digest}` in `name` is replaced by the first digits of its SHA-256: a shard with other content
    gets another name, and never replaces one that a manifest lists.
    """
    buffer = _MEMORY.buffer
    entry = encode_shard(buffer, name, samples)
    entry = entry.model_copy(update={"name": name.format(digest=entry.sha256[:12])})
    if entry.samples:
        with buffer.getbuffer() as memory, memory[: entry.bytes] as data:
            storage.write_bytes(storage.join(store_url, entry.name), data)
    return entry


class _Memory(threading.local):
    """A buffer that each thread reuses: allocating pages would take as long as writing them."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()


_MEMORY = _Memory()
