"""What a training sample costs, by this loader and by others, and what memory it takes.

    python -m tests.benchmarks.loader [--num-samples 2000] [--image-size 224] [--rounds 3]
        [--memory-samples 20000] [--skip PIPELINE …] [--only PIPELINE …]
    python -m tests.s3.server -- python -m tests.benchmarks.loader …     with rows from S3

Every input pipeline feeds the same pictures (windows of phantoms) as normalised float32 batches of
64, each turned, moved and scaled at random by the same amounts, from files that the page cache
holds. Each runs in a process of its own that lives over all rounds; in a round they take turns in
random order, so that a busy machine slows all of them alike. Cost is CPU time of the pipeline's
whole process tree (DataLoader workers, Ray) during an epoch; one thread for arithmetic each.

mosaicml-streaming cannot be installed beside this project (0.13 wants numpy below 2.2, and brings
the SDKs of five clouds and transformers). It runs from a folder of its own that
BENCH_PACKAGES names, filled without its clouds by

    pip install --no-deps --target FOLDER mosaicml-streaming==0.13.0 xxhash zstd brotli \\
        python-snappy cramjam catalogue 'transformers<5' 'huggingface-hub<1' 'tokenizers<0.23' \\
        safetensors
"""

import argparse
import contextlib
import gc
import importlib
import io
import logging
import multiprocessing
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import fsspec
import numpy as np
import numpy.typing as npt
import psutil
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode, v2

from pneumo import storage
from pneumo.config import AugmentConfig, DataConfig
from pneumo.dataset.manifest import Manifest, ShardEntry, SplitEntry
from pneumo.dataset.phantoms.drawing import render_study
from pneumo.dataset.phantoms.population import draw_population
from pneumo.dataset.shards import Sample, write_shard
from pneumo.loading import augmentation
from pneumo.loading.blocks import PreparedStore
from pneumo.loading.loader import Loader, open_loader
from pneumo.loading.sample_order import World
from tests.s3 import server

BATCH_SIZE = 64
SAMPLES_PER_SHARD = 256
PHANTOMS = 40
WINDOW_PX = 900
"""Side of the window of a phantom of 1024 px that becomes a sample."""

PACKAGES = "BENCH_PACKAGES"
AFFINE_ONLY = AugmentConfig(gray_fraction=0)
"""What torchvision's RandomAffine does too."""

Gray = npt.NDArray[np.uint8]
Epoch = Callable[[int], Iterable[Tensor]]
"""Number of the epoch -> its batches of images, (BATCH_SIZE, 1, S, S) float32."""


@dataclass(frozen=True)
class Data:
    """The same samples in every format."""

    folder: Path
    num_samples: int
    image_size: int
    mean: float
    std: float
    s3_url: str | None = None

    @property
    def batches(self) -> int:
        """Full batches of an epoch."""
        return self.num_samples // BATCH_SIZE

    def list_shards(self, name: str) -> list[str]:
        """The tar files of one format."""
        return sorted(str(path) for path in (self.folder / name).rglob("*.tar"))


class LeftOutError(Exception):
    """This pipeline cannot run here; says why."""


# --- the pictures, in the format of each pipeline


def draw_images(num_samples: int, image_size: int) -> Iterator[Gray]:
    """Windows of phantoms, (S, S) uint8, the same at every call."""
    rng = np.random.default_rng(0)
    pictures = [render_study(study)[0] for study in draw_population(PHANTOMS, 0)[:PHANTOMS]]
    for i in range(num_samples):
        picture = pictures[i % PHANTOMS]
        x, y = rng.integers(0, picture.shape[0] - WINDOW_PX, 2)
        window = picture[y : y + WINDOW_PX, x : x + WINDOW_PX]
        yield cv2.resize(window, (image_size, image_size), interpolation=cv2.INTER_AREA)


def write_data(
    folder: Path, num_samples: int, image_size: int, *, formats: set[str], s3_url: str | None
) -> Data:
    """Write the samples in these formats into the empty `folder`, and the store to `s3_url` too."""
    samples = [
        Sample(f"study{i:06d}", pixels, int(i % 3 == 0))
        for i, pixels in enumerate(draw_images(num_samples, image_size))
    ]
    gray = np.stack([sample.pixels for sample in samples[:: max(num_samples // 500, 1)]])
    if "store" in formats:
        write_store(folder / "store", samples, s3_url)
    if "png" in formats:
        write_tars(folder / "png", samples, "png", encode_png)
    if "raw" in formats:
        write_tars(folder / "raw", samples, "npy", encode_npy)
    if "npy" in formats:
        write_npy(folder / "npy", samples)
    if "mds" in formats:
        with contextlib.suppress(LeftOutError):  # its pipeline reports why
            write_mds(folder / "mds", samples)
    mean, std = float(gray.mean() / 255), float(gray.std() / 255)
    return Data(folder, num_samples, image_size, mean, std, s3_url)


def write_store(folder: Path, samples: Iterable[Sample], s3_url: str | None = None) -> None:
    """Our own shards, and the manifest's entry for them."""
    left = iter(samples)
    shards: list[ShardEntry] = []
    while part := list(islice(left, SAMPLES_PER_SHARD)):
        name = f"train/{len(shards):06d}.tar"
        shards.append(write_shard(str(folder), name, part))
        if s3_url:
            storage.write_bytes(storage.join(s3_url, name), (folder / name).read_bytes())
    entry = SplitEntry(
        samples=sum(shard.samples for shard in shards),
        positives=sum(shard.positives for shard in shards),
        patients=sum(shard.samples for shard in shards),
        histogram=(),
        shards=tuple(shards),
    )
    (folder / "train.json").write_text(entry.model_dump_json())


def write_tars(
    folder: Path, samples: Sequence[Sample], suffix: str, encode: Callable[[Gray], bytes]
) -> None:
    """Plain webdataset shards."""
    folder.mkdir()
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        path = folder / f"{start // SAMPLES_PER_SHARD:06d}.tar"
        with wds.TarWriter(str(path), mtime=0, encoder=False) as writer:
            for sample in samples[start : start + SAMPLES_PER_SHARD]:
                image, target = encode(sample.pixels), str(sample.target).encode()
                writer.write({"__key__": sample.key, suffix: image, "cls": target})


def encode_png(pixels: Gray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode_npy(pixels: Gray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    return buffer.getvalue()


def write_npy(folder: Path, samples: Sequence[Sample]) -> None:
    folder.mkdir()
    for sample in samples:
        path = folder / f"{sample.key}_{sample.target}.npy"
        np.save(path, (sample.pixels / 255).astype(np.float16))


def import_streaming() -> Any:
    """mosaicml-streaming, behind our own packages on the path."""
    folder = os.environ.get(PACKAGES)
    if not folder:
        raise LeftOutError(f"{PACKAGES} names no folder that has it")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        raise LeftOutError(str(error)) from error


def write_mds(folder: Path, samples: Sequence[Sample]) -> None:
    columns = {"image": "ndarray:uint8", "target": "int"}
    with import_streaming().MDSWriter(out=str(folder), columns=columns) as writer:
        for sample in samples:
            writer.write({"image": sample.pixels, "target": sample.target})


# --- this project's


def open_ours(data: Data, cache: str, store_url: str | None = None) -> Loader:
    entry = SplitEntry.model_validate_json((data.folder / "store" / "train.json").read_bytes())
    # The loader reads no other field of a manifest.
    known: dict[str, Any] = {"image_size": data.image_size, "splits": {"train": entry}}
    manifest = Manifest.model_construct(**known, mean=data.mean, std=data.std)
    config = DataConfig.model_validate({"cache": cache})
    store = PreparedStore(store_url or str(data.folder / "store"), manifest, config)
    return open_loader(store, "train", world=World(), device="cpu")


def feed_ours(loader: Loader, epoch: int, augment: AugmentConfig = AFFINE_ONLY) -> Iterator[Tensor]:
    batches = loader.epoch(epoch, seed=0, batch_size=BATCH_SIZE, augment=augment)
    return (batch.images for batch in batches)


def open_first(data: Data, cache: str) -> Epoch:
    return lambda epoch: feed_ours(open_ours(data, cache), epoch)


def open_first_s3(data: Data, cache: str) -> Epoch:
    if data.s3_url is None:
        raise LeftOutError(f"no S3 server: run it under tests.s3.server, or set {server.ENDPOINT}")
    return lambda epoch: feed_ours(open_ours(data, cache, data.s3_url), epoch)


def open_later(data: Data, augment: AugmentConfig) -> Epoch:
    loader = open_ours(data, "memory")
    for _ in feed_ours(loader, 0):
        pass
    return lambda epoch: feed_ours(loader, epoch, augment)


# --- those of other libraries


class RandomGamma(nn.Module):
    """A random gamma, which torchvision has as a function only."""

    def forward(self, image: Tensor) -> Tensor:
        amount = AugmentConfig().gray_fraction
        changed: Tensor = v2.functional.adjust_gamma(image, (1 + amount) ** random.uniform(-1, 1))
        return changed


class PerSample:
    """torchvision's transforms for one sample, (S, S) of uint8 or of floats in [0, 1].

    `gray` adds changes of gray levels by our default amounts.
    """

    def __init__(self, data: Data, *, gray: bool = False) -> None:
        self.affine = v2.RandomAffine(
            degrees=5,
            translate=(0.05, 0.05),
            scale=(0.9, 1.1),
            interpolation=InterpolationMode.BILINEAR,
        )
        to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        amount = AugmentConfig().gray_fraction
        jitter = v2.ColorJitter(amount, amount)
        last = [*([RandomGamma(), jitter] if gray else []), v2.Normalize([data.mean], [data.std])]
        self.on_tensors = v2.Compose([*to_float, self.affine, *last])
        self.on_pictures = v2.Compose([self.affine, *to_float, *last])
        self.on_floats = v2.Compose([self.affine, *last])

    def change(self, pixels: npt.NDArray[Any]) -> Tensor:
        tensor: Tensor = self.on_tensors(pixels)
        return tensor

    def change_floats(self, pixels: npt.NDArray[Any]) -> Tensor:
        tensor: Tensor = self.on_floats(torch.from_numpy(pixels.astype(np.float32)).unsqueeze(0))
        return tensor


class Folder(Dataset[tuple[Tensor, int]]):
    """A float16 .npy a study, augmented one by one: the project that this one grew from."""

    def __init__(self, data: Data, *, gray: bool = False) -> None:
        self.paths = sorted((data.folder / "npy").iterdir())
        self.transform = PerSample(data, gray=gray)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        return self.transform.change_floats(np.load(path)), int(path.stem[-1])


def open_folder(data: Data, workers: int, *, gray: bool = False) -> Epoch:
    loader = DataLoader(
        Folder(data, gray=gray),
        BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda epoch: (images for images, _ in loader)


def open_png(data: Data, on_tensors: bool, *, gray: bool = False) -> Epoch:
    """As webdataset's README shows it, in gray."""
    transform = PerSample(data, gray=gray)
    change = transform.on_tensors if on_tensors else transform.on_pictures
    dataset = (
        wds.WebDataset(data.list_shards("png"), shardshuffle=100)
        .shuffle(1000)
        .decode("pill")
        .to_tuple("png", "cls")
        .map_tuple(change, int)
        .batched(BATCH_SIZE, partial=False)
    )
    return lambda epoch: (images for images, _ in dataset)


def open_raw(data: Data) -> Epoch:
    dataset = (
        wds.WebDataset(data.list_shards("raw"), shardshuffle=100)
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "cls")
        .map_tuple(PerSample(data).change, int)
        .batched(BATCH_SIZE, partial=False)
    )
    return lambda epoch: (images for images, _ in dataset)


def open_raw_with_ours(data: Data) -> Epoch:
    """webdataset's reader with our transforms: how much of the difference the transforms make."""
    dataset = (
        wds.WebDataset(data.list_shards("raw"), shardshuffle=100)
        .shuffle(1000)
        .decode()
        .to_tuple("npy", "__key__")
        .batched(BATCH_SIZE, partial=False)
    )

    def feed(epoch: int) -> Iterator[Tensor]:
        for pixels, keys in dataset:
            images = torch.from_numpy(np.asarray(pixels)).unsqueeze(1)
            changed = augmentation.augment(images, keys, AFFINE_ONLY, seed=0, epoch=epoch)
            yield augmentation.normalise(changed, data.mean, data.std)

    return feed


def open_streaming(data: Data) -> Epoch:
    streaming = import_streaming()
    dataset = streaming.StreamingDataset(
        local=str(data.folder / "mds"), shuffle=True, batch_size=BATCH_SIZE
    )
    transform = PerSample(data)

    def collate(samples: Sequence[dict[str, Any]]) -> Any:
        changed = [(transform.change(sample["image"]), sample["target"]) for sample in samples]
        return default_collate(changed)

    loader = DataLoader(dataset, BATCH_SIZE, drop_last=True, collate_fn=collate)
    return lambda epoch: (images for images, _ in loader)


def open_ray(data: Data) -> Epoch:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    import ray
    import ray.data

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    transform = PerSample(data).on_tensors

    # Ray's workers cannot import this file, so the function carries all that it uses.
    def change(batch: dict[str, Any]) -> dict[str, Any]:
        return {"images": np.stack([transform(pixels).numpy() for pixels in batch["npy"]])}

    dataset = ray.data.read_webdataset(data.list_shards("raw"), shuffle="files").map_batches(
        change, batch_size=BATCH_SIZE
    )

    def feed(epoch: int) -> Iterator[Tensor]:
        for batch in dataset.iter_torch_batches(batch_size=BATCH_SIZE, drop_last=True):
            yield batch["images"]

    return feed


class Pipeline(NamedTuple):
    """One row of the table."""

    label: str
    format: str
    """What it reads, one of `write_data`'s."""
    open: Callable[[Data], Epoch]


PIPELINES = {
    "memory-first": Pipeline(
        "ours: memory, first epoch", "store", partial(open_first, cache="memory")
    ),
    "memory-later": Pipeline(
        "ours: memory, later epochs", "store", partial(open_later, augment=AFFINE_ONLY)
    ),
    "memory-gray": Pipeline(
        "ours: the same, gray levels too", "store", partial(open_later, augment=AugmentConfig())
    ),
    "stream": Pipeline("ours: stream", "store", partial(open_first, cache="stream")),
    "memory-s3": Pipeline(
        "ours: memory, first epoch, S3", "store", partial(open_first_s3, cache="memory")
    ),
    "stream-s3": Pipeline("ours: stream, S3", "store", partial(open_first_s3, cache="stream")),
    "npy": Pipeline(".npy a study, v2", "npy", partial(open_folder, workers=0)),
    "npy-workers": Pipeline(".npy a study, v2, 2 workers", "npy", partial(open_folder, workers=2)),
    "npy-gray": Pipeline(
        ".npy a study, v2, gray levels too", "npy", partial(open_folder, workers=0, gray=True)
    ),
    "png": Pipeline("webdataset PNG, v2", "png", partial(open_png, on_tensors=True)),
    "png-pil": Pipeline("webdataset PNG, v2 on PIL", "png", partial(open_png, on_tensors=False)),
    "png-gray": Pipeline(
        "webdataset PNG, v2, gray levels too", "png", partial(open_png, on_tensors=True, gray=True)
    ),
    "raw": Pipeline("webdataset .npy, v2", "raw", open_raw),
    "raw-ours": Pipeline("webdataset .npy, our transforms", "raw", open_raw_with_ours),
    "streaming": Pipeline("mosaicml-streaming, v2", "mds", open_streaming),
    "ray": Pipeline("Ray Data read_webdataset, v2", "raw", open_ray),
}
GOALS = (
    ("memory-later", "npy", 10.0),
    ("memory-later", "npy-workers", 10.0),
    ("memory-later", "png", 15.0),
    ("memory-gray", "npy-gray", 10.0),
    ("memory-gray", "png-gray", 15.0),
    ("memory-first", "npy", 2.0),
    ("memory-first", "png", 2.0),
    ("stream", "npy", 2.0),
    ("stream", "png", 2.0),
    ("memory-s3", "memory-first", 0.8),
    ("stream-s3", "stream", 0.8),
)
"""Samples/s/core of the first, as a multiple of those of the second."""


# --- measuring


class Cost(NamedTuple):
    """Of one sample."""

    cpu_s: float
    wall_s: float


def tree_cpu_s() -> float:
    """CPU time of this process and of all that it started, ended or not; to 10 ms for those."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(child.cpu_times()[:4])  # own, and that of its own ended children
    return total


def measure_epoch(feed: Epoch, epoch: int, data: Data) -> Cost:
    gc.collect()
    cpu_s, wall_s = tree_cpu_s(), time.perf_counter()
    count = sum(len(images) for images in feed(epoch))
    cost = Cost((tree_cpu_s() - cpu_s) / count, (time.perf_counter() - wall_s) / count)
    if count != data.batches * BATCH_SIZE:
        raise LeftOutError(f"{count} samples of {data.batches * BATCH_SIZE}")
    return cost


def check_epoch(feed: Epoch, data: Data) -> None:
    """Run one epoch that does not count, as warm-up; check shape, type and mean of its batches."""
    shape, means = (BATCH_SIZE, 1, data.image_size, data.image_size), []
    for images in feed(0):
        if tuple(images.shape) != shape or images.dtype != torch.float32:
            raise LeftOutError(f"gives {images.dtype} {tuple(images.shape)}, not float32 {shape}")
        means.append(float(images[::16].mean()))
    if len(means) != data.batches or abs(statistics.fmean(means)) > 0.6:
        raise LeftOutError(f"gives {len(means)} batches, their mean is {statistics.fmean(means)}")


def limit_threads() -> None:
    """One thread, and no warnings of the libraries."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def serve(name: str, data: Data, parent: Connection) -> None:
    """In a process of its own: measure an epoch for each number from the parent, until None."""
    limit_threads()
    try:
        feed = PIPELINES[name].open(data)
        check_epoch(feed, data)
        parent.send(None)
        while (epoch := parent.recv()) is not None:
            parent.send(measure_epoch(feed, epoch, data))
    except (LeftOutError, ImportError) as error:
        parent.send(error)
    except Exception as error:
        parent.send(LeftOutError(f"{type(error).__name__}: {error}"))


class Memory(NamedTuple):
    """Resident bytes of a process that feeds a first epoch from memory."""

    decoded: int
    after: int
    """Growth from before the loader was opened to after the epoch."""
    peak: int
    """Growth at its greatest meanwhile."""


def serve_memory(data: Data, parent: Connection) -> None:
    """In a process of its own that has imported all and fed nothing: what was freed before and
    could be used again would hide as much of the growth."""
    limit_threads()
    gc.collect()
    before, _ = read_resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: proc(5)
    loader = open_ours(data, "memory")
    for _ in feed_ours(loader, 0):
        pass
    gc.collect()
    after, peak = read_resident()
    parent.send(Memory(len(loader) * data.image_size**2, after - before, peak - before))


def read_resident() -> tuple[int, int]:
    """Resident bytes of this process, and their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def measure_memory(num_samples: int, image_size: int) -> Memory:
    """Of as many samples of noise."""
    rng = np.random.default_rng(0)
    shape = (image_size, image_size)
    samples = (
        Sample(f"study{i:06d}", rng.integers(0, 256, shape, dtype=np.uint8), 0)
        for i in range(num_samples)
    )
    with tempfile.TemporaryDirectory(prefix="pneumo-bench-") as scratch:
        write_store(Path(scratch) / "store", samples)
        runner = Runner(serve_memory, Data(Path(scratch), num_samples, image_size, 0.5, 0.29))
        try:
            memory: Memory = runner.ask()
        finally:
            runner.stop()
    return memory


class Runner:
    """The process of one pipeline; of one that fails the parent gets the reason."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def ask(self, question: int | None = None) -> Any:
        """The next answer, after `question` where there is one. Raises LeftOutError."""
        try:
            if question is not None:
                self.link.send(question)
            answer = self.link.recv()
        except (EOFError, OSError) as error:
            raise LeftOutError("its process has ended") from error
        if isinstance(answer, Exception):
            raise LeftOutError(str(answer))
        return answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.link.send(None)
        self.process.join(30)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()


def measure(
    names: Sequence[str], data: Data, rounds: int
) -> tuple[dict[str, list[Cost]], dict[str, str]]:
    """Costs of each pipeline by round; and the pipelines that are left out, with their reasons."""
    costs: dict[str, list[Cost]] = {}
    left_out: dict[str, str] = {}
    runners: dict[str, Runner] = {}
    try:
        for name in names:  # one after the other: each has the machine while it warms up
            runner = runners[name] = Runner(serve, name, data)
            try:
                runner.ask()
                costs[name] = []
            except LeftOutError as error:
                left_out[name] = str(error)
        rng = random.Random(0)
        for epoch in range(1, rounds + 1):
            for name in rng.sample(sorted(costs), len(costs)):
                try:
                    costs[name].append(runners[name].ask(epoch))
                except LeftOutError as error:
                    left_out[name] = str(error)
                    del costs[name]
    finally:
        for runner in runners.values():
            runner.stop()
    return {name: costs[name] for name in names if name in costs}, left_out


# --- the report


def median_cost(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(cost.cpu_s for cost in costs),
        statistics.median(cost.wall_s for cost in costs),
    )


def tabulate(costs: dict[str, list[Cost]]) -> list[str]:
    """One row a pipeline, its rate as a multiple of the original project's and of PNG shards."""
    medians = {name: median_cost(found) for name, found in costs.items()}
    columns = {"us CPU": 8, "/s/core": 9, "x .npy": 8, "x PNG": 7, "us wall": 9, "/s": 8}
    rows = [f"{'pipeline':<36}" + "".join(f"{name:>{size}}" for name, size in columns.items())]
    for name, cost in medians.items():
        ratios = [
            f"{medians[other].cpu_s / cost.cpu_s:.2f}" if other in medians else "-"
            for other in ("npy", "png")
        ]
        rows.append(
            f"{PIPELINES[name].label:<36}{cost.cpu_s * 1e6:>8.0f}{1 / cost.cpu_s:>9.0f}"
            f"{ratios[0]:>8}{ratios[1]:>7}{cost.wall_s * 1e6:>9.0f}{1 / cost.wall_s:>8.0f}"
        )
    return rows


def compare_with_goals(costs: dict[str, list[Cost]]) -> list[str]:
    """Each goal, and by how much it is met: the median over rounds of CPU ratios, and their
    range; for S3 those of wall time too."""
    rows = []
    for name, other, goal in GOALS:
        if name not in costs or other not in costs:
            continue
        pairs = list(zip(costs[other], costs[name], strict=False))
        ratios = [theirs.cpu_s / ours.cpu_s for theirs, ours in pairs]
        row = f"{PIPELINES[name].label} / {PIPELINES[other].label}"
        row = f"{row:<72}{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        if name.endswith("-s3"):
            wall = statistics.median(theirs.wall_s / ours.wall_s for theirs, ours in pairs)
            row += f", by wall time {wall:.2f}"
        rows.append(f"{row}  goal {goal:g}")
    return rows


def describe_memory(memory: Memory) -> str:
    after, peak = memory.after / memory.decoded, memory.peak / memory.decoded
    return (
        f"memory: {memory.decoded / 1e6:.0f} MB decoded; resident growth {memory.after / 1e6:.0f} "
        f"MB after the first epoch ({after:.2f}), {memory.peak / 1e6:.0f} at most ({peak:.2f})"
    )


@contextlib.contextmanager
def open_bucket() -> Iterator[str | None]:
    """A bucket on the S3 server that the environment names, removed in the end; None without."""
    endpoint = os.environ.get(server.ENDPOINT)
    if not endpoint:
        yield None
        return
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = f"pneumo-bench-{uuid.uuid4().hex[:12]}"
    fs.mkdir(bucket)
    try:
        yield f"s3://{bucket}/store"
    finally:
        storage.remove_below(f"s3://{bucket}/store")
        fs.rmdir(bucket)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.loader", epilog=f"PIPELINE: {', '.join(PIPELINES)}, memory"
    )
    choices = [*PIPELINES, "memory"]
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--memory-samples", type=int, default=20_000, help="of the memory's line")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    for flag in ("--skip", "--only"):
        parser.add_argument(flag, nargs="+", choices=choices, metavar="PIPELINE", default=[])
    options = parser.parse_args(arguments)
    chosen = [n for n in options.only or choices if n not in options.skip]
    # Before torch and Ray start their threads in the processes to come.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    limit_threads()
    if "memory" in chosen:
        chosen.remove("memory")
        print(describe_memory(measure_memory(options.memory_samples, options.image_size)))
    with tempfile.TemporaryDirectory(prefix="pneumo-bench-") as scratch, open_bucket() as s3_url:
        data = write_data(
            Path(scratch),
            options.num_samples,
            options.image_size,
            formats={PIPELINES[name].format for name in chosen},
            s3_url=s3_url,
        )
        costs, left_out = measure(chosen, data, options.rounds)
    if costs:
        print(
            f"\n{data.num_samples} samples, {data.image_size} px, batches of {BATCH_SIZE}, "
            f"medians of {options.rounds} rounds; a sample's cost, CPU time of the process tree"
        )
        print("\n".join([*tabulate(costs), "", *compare_with_goals(costs)]))
    for name, reason in left_out.items():
        print(f"left out: {PIPELINES[name].label}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
