"""The store's format: what is written is read, by us and by others; what is damaged is refused."""

import gc
import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pneumo import storage
from pneumo.dataset.manifest import (
    Duplicates,
    FileEntry,
    Manifest,
    ShardEntry,
    find_manifest,
    read_manifest,
    write_manifest,
)
from pneumo.dataset.shards import (
    BLOCK_SAMPLES,
    Sample,
    block_samples,
    decode_block,
    encode_shard,
    read_shard,
    sample_bytes,
    shard_samples,
    write_shard,
)
from pneumo.dataset.source import Rejected
from pneumo.dataset.study_table import (
    StudyRow,
    find_duplicates,
    read_quarantine,
    read_studies,
    tabulate_studies,
    write_quarantine,
    write_studies,
)
from pneumo.errors import DataError, StoreError
from pneumo.images.boxes import Box
from tests.examples import examples

StoreMaker = Callable[..., str]
SIZE = 8

keys = st.text("0123456789abcdef", min_size=20, max_size=20)


@st.composite
def samples_of_a_shard(draw: st.DrawFn) -> list[Sample]:
    names = draw(st.lists(keys, unique=True, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    return [
        Sample(name, rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8), draw(st.integers(0, 1)))
        for name in names
    ]


def some_samples(number: int = 4) -> list[Sample]:
    rng = np.random.default_rng(number)
    return [
        Sample(rng.bytes(10).hex(), rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8), i % 2)
        for i in range(number)
    ]


def encode(samples: Iterable[Sample], name: str = "train/000007.tar") -> tuple[ShardEntry, bytes]:
    buffer = io.BytesIO()
    entry = encode_shard(buffer, name, samples)
    return entry, buffer.getvalue()


def describe(data: bytes, samples: int) -> ShardEntry:
    return ShardEntry(
        name="train/000007.tar",
        samples=samples,
        positives=0,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        blocks=(),
    )


def read(store: Path, data: bytes, samples: int) -> list[Sample]:
    """The samples of a shard of these bytes, which the manifest says for."""
    entry = describe(data, samples)
    path = store / entry.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return list(read_shard(str(store), entry, SIZE))


def assert_equal(one: list[Sample], two: list[Sample]) -> None:
    assert [(s.key, s.target) for s in one] == [(s.key, s.target) for s in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert a.pixels.dtype == b.pixels.dtype == np.uint8


# --- samples --------------------------------------------------------------------------------------


@given(samples_of_a_shard())
def test_a_shard_round_trips_in_order_and_encodes_to_equal_bytes(samples: list[Sample]) -> None:
    entry, data = encode(samples)
    storage.write_bytes(f"memory://shards/{entry.name}", data)
    assert_equal(list(read_shard("memory://shards", entry, SIZE)), samples)
    blocks = [
        decode_block(data[block.offset : block.offset + block.bytes], entry, block, SIZE)
        for block in entry.blocks
    ]
    assert_equal([sample for block in blocks for sample in block], samples)
    assert encode(iter(samples)) == (entry, data)


@given(samples_of_a_shard())
def test_the_bytes_are_those_of_webdatasets_writer(samples: list[Sample]) -> None:
    """It alone pads a tar with zeros to a multiple of 10,240 bytes."""
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, user="", group="", mtime=0, encoder=False) as writer:
        for sample in samples:
            array = io.BytesIO()
            np.save(array, sample.pixels)
            label = str(sample.target).encode()
            writer.write({"__key__": sample.key, "npy": array.getvalue(), "cls": label})
    written, (_, data) = buffer.getvalue(), encode(samples)
    assert written[: len(data)] == data
    assert not written[len(data) :].strip(b"\0")


def test_members_carry_no_time_no_owner_and_no_extended_header() -> None:
    samples = [Sample("0123456789abcdef0123", np.arange(64, dtype=np.uint8).reshape(8, 8), 1)]
    with tarfile.open(fileobj=io.BytesIO(encode(samples)[1])) as tar:
        members = tar.getmembers()
    assert [(m.name, m.mtime, m.uname, m.gname, m.pax_headers) for m in members] == [
        (f"0123456789abcdef0123.{extension}", 0, "", "", {}) for extension in ("cls", "npy")
    ]


def test_the_standard_library_reads_a_shard() -> None:
    samples = some_samples()
    with tarfile.open(fileobj=io.BytesIO(encode(samples)[1])) as tar:
        content = {m.name: tar.extractfile(m) for m in tar.getmembers()}
        assert len(content) == 2 * len(samples)
        for sample in samples:
            image, target = content[f"{sample.key}.npy"], content[f"{sample.key}.cls"]
            assert image is not None
            assert target is not None
            np.testing.assert_array_equal(np.load(io.BytesIO(image.read())), sample.pixels)
            assert target.read() == str(sample.target).encode()


def test_plain_webdataset_reads_a_prepared_store_on_two_workers(tiny_store: StoreMaker) -> None:
    store_url = tiny_store(train=40, samples_per_shard=10)
    manifest = read_manifest(store_url)
    urls = [f"{store_url}/{entry.name}" for entry in manifest.splits["train"].shards]
    split = wds.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "npy", "cls")
    batches = list(DataLoader(split.batched(4), batch_size=None, num_workers=2))
    assert {images.shape[1:] for _, images, _ in batches} == {(32, 32)}
    assert len(batches) == 2 * 5  # each worker has two shards of ten
    found = {
        key: (image, target)
        for keys, images, targets in batches
        for key, image, target in zip(keys, images, targets, strict=True)
    }
    expected = [s for e in manifest.splits["train"].shards for s in read_shard(store_url, e, 32)]
    assert set(found) == {sample.key for sample in expected}
    for sample in expected:
        np.testing.assert_array_equal(found[sample.key][0], sample.pixels)
        assert found[sample.key][1] == sample.target


def test_a_written_shard_is_described_and_read(tmp_path: Path) -> None:
    samples = some_samples(5)
    entry = write_shard(str(tmp_path), "val/000000.tar", samples)
    path = tmp_path / "val" / "000000.tar"
    assert (entry.samples, entry.positives, entry.bytes) == (5, 2, path.stat().st_size)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_equal(list(read_shard(str(tmp_path), entry, SIZE)), samples)


@pytest.mark.parametrize("number", [0, 1, 63, 64, 65, 200])
def test_blocks_are_whole_tars_of_64_neighbours(number: int) -> None:
    samples = some_samples(number)
    entry, data = encode(samples)
    assert sum(block.samples for block in entry.blocks) == entry.samples == number
    assert all(block.samples == BLOCK_SAMPLES for block in entry.blocks[:-1])
    read: list[str] = []
    end = 0
    for block in entry.blocks:
        assert block.offset == end
        end = block.offset + block.bytes
        part = data[block.offset : end]
        assert blake3(part).hexdigest() == block.blake3
        with tarfile.open(fileobj=io.BytesIO(part)) as tar:
            read += [name.split(".")[0] for name in tar.getnames() if name.endswith(".npy")]
    assert read == [sample.key for sample in samples]
    assert not data[end:].strip(b"\0")  # nothing but the end marker is in no block


@pytest.mark.parametrize(
    ("image_size", "block", "shard"),
    [(32, 64, 512), (224, 64, 512), (512, 16, 102), (1024, 4, 25)],
)
def test_blocks_and_shards_of_large_pictures_hold_fewer(
    image_size: int, block: int, shard: int
) -> None:
    assert block_samples(image_size) == block
    assert shard_samples(image_size) == shard
    pixels = np.zeros((image_size, image_size), np.uint8)
    number = min(2 * block + 1, 9)
    samples = [Sample(f"{i:020x}", pixels, 0) for i in range(number)]
    entry, data = encode(samples)
    # The end marker is of two blocks.
    assert len(data) == number * sample_bytes(image_size) + 1024
    assert max(part.samples for part in entry.blocks) == min(block, number)
    assert block * sample_bytes(image_size) <= 4_300_000
    assert shard * sample_bytes(image_size) <= 27_000_000


def test_shards_written_one_after_the_other_share_memory_but_nothing_else(tmp_path: Path) -> None:
    class BrokenError(Exception):
        pass

    def breaking(samples: list[Sample]) -> Iterator[Sample]:
        yield from samples
        raise BrokenError

    for k, number in enumerate((70, 3, 65, 1)):
        samples, name = some_samples(number), f"train/{k:06d}.tar"
        with pytest.raises(BrokenError):
            write_shard(str(tmp_path), name, breaking(some_samples(90)))
        assert not (tmp_path / name).exists()
        entry, data = encode(samples, name)
        assert write_shard(str(tmp_path), name, iter(samples)) == entry
        assert (tmp_path / name).read_bytes() == data


def test_threads_decode_without_disturbing_each_other(tmp_path: Path) -> None:
    # Python before 3.11.9 fails when a collection lets another thread in while it parses a header.
    samples = some_samples(64)
    entry = write_shard(str(tmp_path), "a.tar", samples)

    def let_others_in(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    threshold = gc.get_threshold()
    gc.callbacks.append(let_others_in)
    gc.set_threshold(30)
    try:
        with ThreadPoolExecutor(4) as pool:
            reads = pool.map(lambda _: list(read_shard(str(tmp_path), entry, SIZE)), range(32))
            for found in reads:
                assert_equal(found, samples)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(let_others_in)


def test_pixels_can_be_written_to(tmp_path: Path) -> None:
    [sample] = read(tmp_path, encode(some_samples(1))[1], 1)
    sample.pixels[0, 0] = 7
    assert sample.pixels[0, 0] == 7


def test_other_spellings_of_the_same_array_are_read(tmp_path: Path) -> None:
    pixels = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    fortran, second = io.BytesIO(), io.BytesIO()
    np.save(fortran, np.asfortranarray(pixels))
    np.lib.format.write_array(second, pixels, version=(2, 0))
    for encoded in (fortran, second):
        data = write_tar({"a.npy": encoded.getvalue(), "a.cls": b"1"})
        [sample] = read(tmp_path, data, 1)
        np.testing.assert_array_equal(sample.pixels, pixels)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "a byte"])
def test_a_shard_that_changed_is_refused(tmp_path: Path, damage: str) -> None:
    entry = write_shard(str(tmp_path), "a.tar", some_samples())
    path = tmp_path / "a.tar"
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), 600):
        changed = bytearray(data[:place]) if damage == "cut" else bytearray(data)
        if damage == "a byte":
            changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DataError, match=r"shard a\.tar: not what the manifest says"):
            list(read_shard(str(tmp_path), entry, SIZE))


def test_a_shard_that_was_cut_before_it_was_described_is_refused(tmp_path: Path) -> None:
    _, data = encode(some_samples())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end_of_samples = max(m.offset_data + m.size for m in tar.getmembers())
    for end in range(0, end_of_samples, 256):
        with pytest.raises(DataError, match=r"shard train/000007\.tar: "):
            read(tmp_path, data[:end], 4)


def test_another_shard_in_the_place_of_one_is_refused(tmp_path: Path) -> None:
    entry = write_shard(str(tmp_path), "a.tar", some_samples(4))
    write_shard(str(tmp_path), "a.tar", some_samples(4)[::-1])
    with pytest.raises(DataError, match=r"shard a\.tar: "):
        list(read_shard(str(tmp_path), entry, SIZE))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"shard train/000007\.tar: missing from {tmp_path}"):
        list(read_shard(str(tmp_path), describe(b"", 0), SIZE))


@pytest.mark.parametrize("claimed", [3, 5])
def test_a_wrong_number_of_samples_is_refused(tmp_path: Path, claimed: int) -> None:
    _, data = encode(some_samples(4))
    with pytest.raises(DataError, match=f"000007.tar: 4 samples, the manifest says {claimed}"):
        read(tmp_path, data, claimed)


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.zeros((SIZE, SIZE + 1), np.uint8), r"uint8 \(8, 9\)"),
        (np.zeros((SIZE, SIZE), np.uint16), r"uint16 \(8, 8\)"),
        (np.zeros((SIZE, SIZE, 1), np.uint8), r"uint8 \(8, 8, 1\)"),
    ],
)
def test_a_sample_of_another_shape_is_refused(tmp_path: Path, pixels: Any, found: str) -> None:
    _, data = encode([Sample("0" * 20, pixels, 0)])
    with pytest.raises(DataError, match=rf"sample 0 is {found}, expected uint8 \(8, 8\)"):
        read(tmp_path, data, 1)


def write_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def encoded_image(*, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[object]]) if pickled else np.zeros((SIZE, SIZE), np.uint8))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        {"a.npy": encoded_image()},
        {"a.cls": b"1"},
        {"a.npy": encoded_image(), "a.cls": b"yes"},
        {"a.npy": b"", "a.cls": b"1"},
        {"a.npy": encoded_image()[:100], "a.cls": b"1"},
        {"a.npy": encoded_image(pickled=True), "a.cls": b"1"},
    ],
    ids=["no target", "no image", "bad target", "empty image", "half an image", "a pickle"],
)
def test_a_sample_that_does_not_decode_is_refused(
    tmp_path: Path, members: dict[str, bytes]
) -> None:
    data = write_tar(members)
    with pytest.raises(DataError, match=r"shard train/000007\.tar: sample 0 does not decode"):
        read(tmp_path, data, 1)


# --- manifest -------------------------------------------------------------------------------------


def edit_manifest(store_url: str, **changes: Any) -> None:
    path = Path(store_url) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_round_trips(tiny_store: StoreMaker, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_store())
    write_manifest(str(tmp_path), manifest)
    again = read_manifest(str(tmp_path))
    assert again == manifest
    assert again.digest == manifest.digest


def test_a_manifest_is_written_once(tiny_store: StoreMaker, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_store())
    for _ in range(2):  # two jobs that did the same
        write_manifest(str(tmp_path), manifest)
    with pytest.raises(StoreError, match="another job has finished another store there meanwhile"):
        write_manifest(str(tmp_path), manifest.model_copy(update={"seed": 77}))
    assert read_manifest(str(tmp_path)) == manifest


def test_the_digest_tells_stores_apart(tiny_store: StoreMaker) -> None:
    one, same, other = (read_manifest(tiny_store(seed=seed)) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert one.model_copy(update={"quarantined": {"missing": 1}}).digest != one.digest


def test_a_folder_without_manifest_is_no_store(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    storage.remove(storage.join(store_url, "manifest.json"))
    assert find_manifest(store_url) is None
    with pytest.raises(StoreError, match=rf"^{store_url}: no manifest\.json.*run jobs\.prepare"):
        read_manifest(store_url)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": 4}'])
def test_an_unreadable_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    for read in (find_manifest, read_manifest):
        with pytest.raises(
            StoreError, match=r"manifest\.json: not a manifest of schema 4: .*prepare"
        ):
            read(str(tmp_path))


def test_a_half_manifest_is_refused(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    path = Path(store_url) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StoreError, match=r"manifest\.json: not a manifest of schema 4"):
        read_manifest(store_url)


@pytest.mark.parametrize("version", [3, 5])
def test_a_manifest_of_another_schema_is_refused(tiny_store: StoreMaker, version: int) -> None:
    store_url = tiny_store()
    edit_manifest(store_url, new_field=True)
    with pytest.raises(StoreError, match="not a manifest of schema 4: new_field: "):
        read_manifest(store_url)
    edit_manifest(store_url, schema_version=version)
    for read in (find_manifest, read_manifest):
        with pytest.raises(
            StoreError, match=f"manifest of schema {version}, this version reads 4; prepare the"
        ):
            read(store_url)


def test_a_manifest_without_a_split_is_refused(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    edit_manifest(store_url, splits={})
    with pytest.raises(StoreError, match=r"not a manifest of schema 4: splits: .*train, val, test"):
        read_manifest(store_url)


def test_every_field_of_the_manifest_is_of_a_plain_type(tiny_store: StoreMaker) -> None:
    store_url = tiny_store()
    text = storage.read_text(storage.join(store_url, "manifest.json"))
    only_where_told = {"warnings", "layout", "joined_layouts", "left_out", "phantoms"}
    assert set(json.loads(text)) == set(Manifest.model_fields) - only_where_told


# --- studies.parquet ------------------------------------------------------------------------------

rows = st.builds(
    StudyRow,
    key=keys,
    patient=keys,
    split=st.sampled_from(["train", "val", "test"]),
    target=st.integers(0, 1),
    finding=st.sampled_from(["Lung Opacity", "Normal"]),
    boxes=st.lists(st.builds(Box, *[st.floats(-1e3, 1e3)] * 4), max_size=3).map(tuple),
    age=st.none() | st.integers(0, 120),
    sex=st.none() | st.sampled_from(["M", "F"]),
    view=st.none() | st.sampled_from(["AP", "PA"]),
    spacing_mm=st.none() | st.floats(0.1, 1),
    pixels_digest=keys,
    source_blake3=keys,
)


@pytest.fixture(scope="module")
def small_manifest(tiny_store: StoreMaker) -> Manifest:
    return read_manifest(tiny_store())


@examples(50)
@given(st.lists(rows, max_size=5, unique_by=lambda row: row.key))
def test_studies_round_trip_with_boxes_and_gaps(
    small_manifest: Manifest, table: list[StudyRow]
) -> None:
    entry = write_studies("memory://studies", tabulate_studies(table))
    manifest = small_manifest.model_copy(update={"studies": entry})
    read = read_studies("memory://studies", manifest)
    assert list(read.values()) == sorted(table, key=lambda row: row.key)
    assert list(read) == [row.key for row in read.values()]


def test_columns_have_the_same_types_whatever_is_missing(tmp_path: Path) -> None:
    row = StudyRow("k", "p", "val", 0, "Normal", (), None, None, None, None, "d", "e")
    full = StudyRow("k", "p", "val", 1, "Normal", (Box(1, 2, 3, 4),), 3, "F", "AP", 0.1, "d", "e")
    schemas = []
    for content in ([row], [full], []):
        write_studies(str(tmp_path), tabulate_studies(content))
        schemas.append(pq.read_schema(tmp_path / "studies.parquet"))
    assert schemas[0] == schemas[1] == schemas[2]


pictures = st.sampled_from(["a", "b", "c", "d"])
people = st.sampled_from(["ann", "bob", "cem"])
places = st.sampled_from(["train", "val"])


@given(st.lists(st.tuples(pictures, people, places), max_size=12))
def test_duplicates_are_counted_within_and_across_patients_and_splits(
    table: list[tuple[str, str, str]],
) -> None:
    studies = tabulate_studies(
        StudyRow(str(i), patient, split, 0, "Normal", (), None, None, None, None, picture, "e")
        for i, (picture, patient, split) in enumerate(table)
    )
    groups = [[row for row in table if row[0] == name] for name in "abcd"]
    several = [group for group in groups if len(group) > 1]
    found = Duplicates(
        pictures=len(several),
        studies=sum(map(len, several)),
        across_patients=sum(len({row[1] for row in group}) > 1 for group in several),
        across_splits=sum(len({row[2] for row in group}) > 1 for group in several),
    )
    assert find_duplicates(studies, has_patients=True) == found
    unknown = found.model_copy(update={"across_patients": None})
    assert find_duplicates(studies, has_patients=False) == unknown


@pytest.mark.parametrize("damage", ["missing", "cut", "a byte", "a target"])
def test_studies_that_are_other_than_the_manifest_says_are_refused(
    tiny_store: StoreMaker, damage: str
) -> None:
    store_url = tiny_store()
    manifest = read_manifest(store_url)
    table = list(read_studies(store_url, manifest).values())
    path = Path(store_url) / "studies.parquet"
    data = bytearray(path.read_bytes())
    path.unlink()
    message = "not what the manifest says: .*; delete the store and prepare it again"
    if damage == "missing":
        message = f"missing from {store_url}; delete the store and prepare it again"
    elif damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "a byte":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "a target":  # as a table it is sound
        table[3] = replace(table[3], target=1 - table[3].target)
        write_studies(store_url, tabulate_studies(table))
    with pytest.raises(DataError, match=rf"studies\.parquet: {message}"):
        read_studies(store_url, manifest)


@pytest.mark.parametrize("content", ["text", "other columns"])
def test_what_the_manifest_says_and_yet_no_table_of_studies_is_refused(
    tiny_store: StoreMaker, content: str
) -> None:
    store_url = tiny_store()
    path = Path(store_url) / "studies.parquet"
    if content == "text":
        path.write_text("key,patient\n")
    else:
        pq.write_table(pa.table({"key": ["a"]}), path)
    data = path.read_bytes()
    entry = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest = read_manifest(store_url).model_copy(update={"studies": entry})
    with pytest.raises(DataError, match=r"studies\.parquet: not a table of studies; delete the"):
        read_studies(store_url, manifest)


def test_the_quarantine_round_trips_and_is_in_the_manifest(
    tiny_store: StoreMaker, small_manifest: Manifest
) -> None:
    store_url = tiny_store()
    rejected = [
        Rejected("b" * 20, "val", "missing", "no DICOM file"),
        Rejected("a" * 20, None, "contradiction", "two classes"),
    ]
    entry = write_quarantine(store_url, rejected)
    manifest = small_manifest.model_copy(update={"quarantine": entry})
    assert read_quarantine(store_url, manifest) == rejected[::-1]
    path = Path(store_url) / "quarantine.jsonl"
    path.write_text(path.read_text().replace("val", "train"))
    with pytest.raises(DataError, match=r"quarantine\.jsonl: not what the manifest says"):
        read_quarantine(store_url, manifest)
