"""What `tests.benchmarks.loader` compares: input pipelines, and the same samples in each format.

mosaicml-streaming cannot be installed beside this project (0.13 wants numpy below 2.2, and brings
the SDKs of five clouds and transformers). It runs from a folder of its own that
BENCH_PACKAGES names, filled without its clouds by

    pip install --no-deps --target FOLDER mosaicml-streaming==0.13.0 xxhash zstd brotli \\
        python-snappy cramjam catalogue 'transformers<5' 'huggingface-hub<1' 'tokenizers<0.23' \\
        safetensors
"""

import contextlib
import importlib
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
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
