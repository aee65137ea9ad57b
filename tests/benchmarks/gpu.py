"""Training speed of one GPU: images/s, the fraction of the chip's limit, seconds an epoch of RSNA.

    python tests/benchmarks/gpu.py [--batch-sizes 256 512 1024 2048] [--modes eager compile …]
        [--paths thread thread-compiled …] [--plain-stem] [--repeats 5] [--json FILE]
    python tests/benchmarks/gpu.py --smoke     tiny and on the CPU: does it run?

It needs torch and numpy alone, and nothing of this project, so this one file can be carried to a
machine that has a GPU. It trains ResNet-18 (one input channel, one logit) in
channels_last and bfloat16 autocast with fused Adam and a weighted BCE, on random images that the
device holds as bytes. A step is one micro-batch, without what
`pneumo.training.train_step` does around it: running statistics, the average of the weights.

The data path mirrors `pneumo.loading.augmentation.augment` as it is on a GPU, with the defaults of
`AugmentConfig`: rows gathered, each image moved by a matrix of its own (grid_sample), rounded, and
recoloured by a table of its own, which normalises too. `tests/benchmarks/test_gpu.py` compares
them. Six variants are measured:

    host        drawn on the host from a hash of (seed, epoch, key), and copied, in the step's time
    thread      the same as pneumo does it: one batch ahead in a thread, on a stream of its own
    thread-compiled    the same, applied by torch.compile: pneumo's train.compile true
    device      drawn and applied on the device
    compiled    the same, by torch.compile
    ahead       the same, one batch ahead, on a stream of its own

and `none`: the bare step, on one batch again and again. They take turns, so that other load slows
all of them alike. A time is the median over the repeats, each of one epoch's steps
between two CUDA events; the chip's peaks are known by its name, or given. All of it may take half
an hour; the JSON file is written as rows come. What cannot run, for want of memory or of a
compiler, is reported in one line.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

RSNA_IMAGES = 21_347
"""Training images of RSNA: four fifths of its 26,684."""
EPOCH_GOAL_S = 1.0
"""Of an epoch of RSNA with augmentation, on an H200."""
DATA_GOAL = 0.05
"""Largest fraction of a step that the data path may take."""

PEAKS = {
    "NVIDIA H200": (989.0, 4.8),
    "NVIDIA H100 80GB HBM3": (989.0, 3.35),
    "NVIDIA H100 PCIe": (756.0, 2.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 2.04),
    "NVIDIA A100-SXM4-40GB": (312.0, 1.56),
    "NVIDIA A100 80GB PCIe": (312.0, 1.94),
    "NVIDIA L40S": (362.0, 0.86),
    "NVIDIA L4": (121.0, 0.3),
}
"""TFLOP/s of dense bfloat16 and TB/s, by the name that the driver gives (NVIDIA's datasheets). A
part of a chip (MIG) has another name."""

ROTATION_DEGREES, TRANSLATION, SCALE, GRAY = 5.0, 0.05, 0.1, 0.1
"""The defaults of pneumo's AugmentConfig; GRAY is of brightness, contrast and gamma."""
MEAN, STD = 0.5, 0.25
POS_WEIGHT = 3.4

WARM_UP_STEPS = 10

MODES = {
    "eager": "without cudnn.benchmark",
    "eager-tuned": "with it, as pneumo trains",
    "compile": "torch.compile of the network, too: pneumo's train.compile true",
    "max-autotune-no-cudagraphs": "the fastest kernels searched for, in minutes",
    "reduce-overhead": "compiled and replayed as CUDA graphs; no setting: gradients that add up "
    "over micro-batches would be overwritten",
    "max-autotune": "both",
}
PATHS = ("host", "thread", "thread-compiled", "device", "compiled", "ahead")

Batch = tuple[Tensor, Tensor]
"""(B, 1, S, S) float32 normalised, and (B,) float32 of 0 and 1."""


# --- the chip's limit


def count_forward_flops(image_size: int) -> int:
    """2 x multiply-adds of ResNet-18's convolutions and classifier for one gray image."""
    side, channels = _halve(image_size), 64
    macs = 49 * channels * side**2
    side = _halve(side)  # pooling
    for width in (64, 128, 256, 512):
        if width != channels:
            side = _halve(side)
            macs += channels * width * side**2  # the shortcut's 1 x 1
        macs += 9 * (channels + 3 * width) * width * side**2
        channels = width
    return 2 * (macs + channels)


def count_activations(image_size: int) -> int:
    """Numbers that ResNet-18's convolutions put out for one image."""
    side = _halve(image_size)
    total = 64 * side**2
    side = _halve(side)
    for width in (64, 128, 256, 512):
        if width != 64:
            side = _halve(side)
        total += (4 if width == 64 else 5) * width * side**2
    return total


def _halve(side: int) -> int:
    return (side + 1) // 2


PASSES = 14
"""Times that a step moves each activation between chip and memory, by estimate. Forward 5: written
by the convolution, read for BatchNorm's statistics, read and written normalised (ReLU fused), read
by the next. Backward 9: the gradient is written by the next, read with the activation for
BatchNorm's sums, both read and the result written, read with the input for the weights' gradient,
read for the input's."""
BYTES_PER_WEIGHT = 34
"""Adam reads weight, gradient and two moments and writes three of them, 4 bytes each; autocast
reads 4 and writes 2."""


class Limit(NamedTuple):
    """What a step costs at least, in seconds an image, at the chip's peaks."""

    by_flops_s: float
    by_bytes_s: float


def find_limit(
    image_size: int, batch_size: int, num_weights: int, *, tflops: float, tb_per_s: float
) -> Limit:
    """Backward costs twice what forward does, in FLOPs."""
    moved = PASSES * 2 * count_activations(image_size) + BYTES_PER_WEIGHT * num_weights / batch_size
    return Limit(3 * count_forward_flops(image_size) / (tflops * 1e12), moved / (tb_per_s * 1e12))


# --- the data path


def draw_by_hash(keys: Sequence[str], *, seed: int, epoch: int) -> Tensor:
    """(B, 7) float64 uniforms in [0, 1]: pneumo's draws for the matrix (4) and the table (3)."""

    def draw(key: str, count: int, person: bytes) -> bytes:
        name = f"{seed}/{epoch}/{key}".encode()
        return hashlib.blake2b(name, digest_size=8 * count, person=person).digest()

    rows = [np.frombuffer(draw(key, 4, b"") + draw(key, 3, b"gray"), "<u8") for key in keys]
    return torch.from_numpy(np.stack(rows).astype(np.float64) / 2**64)


def build_matrices(uniforms: Tensor) -> Tensor:
    """(B, 7) -> (B, 2, 3), from output to input, both axes in [-1, 1] as grid_sample has them."""
    u = 2 * uniforms - 1
    angle, scale, shift = (
        np.deg2rad(ROTATION_DEGREES) * u[:, 0],
        1 + SCALE * u[:, 1],
        2 * TRANSLATION * u[:, 2:4],
    )
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    return torch.cat([turn, -(turn * shift[:, None]).sum(2, keepdim=True)], 2)


def build_tables(uniforms: Tensor) -> Tensor:
    """(B, 7) -> (B, 256): what each gray level becomes, normalised."""
    u = 2 * uniforms[:, 4:, None] - 1
    levels = torch.arange(256, dtype=u.dtype, device=u.device) / 255
    gray = levels ** ((1 + GRAY) ** u[:, 0])
    gray = ((gray - 0.5) * (1 + GRAY * u[:, 1]) + 0.5).clamp(0, 1) * (1 + GRAY * u[:, 2])
    return (gray.clamp(0, 1) - MEAN) / STD


def warp(images: Tensor, matrices: Tensor, tables: Tensor) -> Tensor:
    """(B, 1, S, S) uint8 -> float32, moved and recoloured."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
    return tables.gather(1, moved.round_().flatten(1).long()).reshape(images.shape)


def augment_rows(images: Tensor, rows: Tensor, uniforms: Tensor) -> Tensor:
    """The rows' images, changed by draws that are on the device."""
    return warp(images.index_select(0, rows), build_matrices(uniforms), build_tables(uniforms))


class Data:
    """Random images and targets, held on the device."""

    def __init__(self, num_images: int, image_size: int, batch_size: int, device: torch.device):
        if batch_size > num_images:
            raise ValueError(f"a batch of {batch_size} is more than the {num_images} images")
        self.device, self.batch_size, self.num_images = device, batch_size, num_images
        self.steps = num_images // batch_size
        self.images = torch.randint(
            256, (num_images, 1, image_size, image_size), dtype=torch.uint8, device=device
        )
        self.targets = (torch.rand(num_images, device=device) < 1 / (1 + POS_WEIGHT)).float()
        self.keys = [f"{i:036d}" for i in range(num_images)]

    def orders(self) -> Iterator[tuple[int, Tensor]]:
        """Epoch after epoch, without end: its number and the rows of each step, on the CPU."""
        generator = torch.Generator().manual_seed(0)
        for epoch in itertools.count():
            order = torch.randperm(self.num_images, generator=generator)
            for rows in order.split(self.batch_size)[: self.steps]:
                yield epoch, rows

    def feed_from_host(self, apply: Callable[..., Tensor] = warp) -> Iterator[Batch]:
        """Drawn on the host; `apply` is as `warp`."""
        for epoch, rows in self.orders():
            on_device = self.send(rows)
            uniforms = draw_by_hash([self.keys[i] for i in rows.tolist()], seed=0, epoch=epoch)
            matrices, tables = build_matrices(uniforms), build_tables(uniforms)
            changed = apply(
                self.images.index_select(0, on_device),
                self.send(matrices.float()),
                self.send(tables.float()),
            )
            yield changed, self.targets[on_device]

    def send(self, tensor: Tensor) -> Tensor:
        """Copy to the device, asynchronously."""
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def feed_from_device(self, augment: Callable[..., Tensor] = augment_rows) -> Iterator[Batch]:
        """Drawn on the device too; `augment` is as `augment_rows`."""
        generator = torch.Generator(self.device).manual_seed(0)
        while True:
            order = torch.randperm(self.num_images, generator=generator, device=self.device)
            for rows in order.split(self.batch_size)[: self.steps]:
                uniforms = torch.rand(len(rows), 7, generator=generator, device=self.device)
                yield augment(self.images, rows, uniforms), self.targets[rows]

    def feed(self, path: str) -> Iterator[Batch]:
        """Endless batches by one of PATHS."""
        if path == "host":
            return self.feed_from_host()
        if path == "thread":
            return run_in_thread(self.feed_from_host(), self.device)
        if path == "thread-compiled":
            batches = self.feed_from_host(torch.compile(warp, dynamic=False))
            return run_in_thread(batches, self.device)
        if path == "device":
            return self.feed_from_device()
        batches = self.feed_from_device(torch.compile(augment_rows, dynamic=False))
        return batches if path == "compiled" else run_ahead(batches)


def run_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each made on a stream of its own while the step before computes."""
    stream, here = torch.cuda.Stream(), torch.cuda.current_stream()

    def make() -> Batch:
        stream.wait_stream(here)  # one batch ahead and no more: the host may be far ahead
        with torch.cuda.stream(stream):
            return next(batches)

    batch = make()
    while True:
        here.wait_stream(stream)
        for tensor in batch:
            tensor.record_stream(here)
        upcoming = make()
        yield batch
        batch = upcoming


def run_in_thread(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same, each made in a thread while the step before computes."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make() -> tuple[Batch, torch.cuda.Event | None]:
        if stream is None:
            return next(batches), None
        with torch.cuda.stream(stream):
            return next(batches), stream.record_event()

    pool = ThreadPoolExecutor(1)
    upcoming = pool.submit(make)
    while True:
        batch, is_made = upcoming.result()
        upcoming = pool.submit(make)
        if is_made is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(is_made)
            for tensor in batch:
                tensor.record_stream(here)
        yield batch


# --- the step


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, named as torchvision names them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + shortcut, inplace=True)


class Stem(nn.Conv2d):
    """7 x 7 with stride 2 over one channel, on a GPU as 4 x 4 with stride 1 over four channels, as
    `pneumo.network.gray_convolution` has it: cuDNN has no fast kernels for one channel."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d names it
        if not input.is_cuda or input.shape[-1] % 2:
            return super().forward(input)
        kernel = F.pixel_unshuffle(F.pad(self.weight, (1, 0, 1, 0)), 2)
        channels = F.pad(F.pixel_unshuffle(input, 2), (2, 1, 2, 1))
        return F.conv2d(channels.contiguous(memory_format=torch.channels_last), kernel)


class ResNet18(nn.Module):
    """He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with one input channel
    and one logit: (B, 1, S, S) -> (B, 1)."""

    def __init__(self, *, plain_stem: bool = False) -> None:
        super().__init__()
        stem = nn.Conv2d if plain_stem else Stem
        self.conv1 = stem(1, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.fc = nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Step:
    """A network and what trains it."""

    def __init__(self, mode: str, device: torch.device, *, plain_stem: bool = False) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = (
            ResNet18(plain_stem=plain_stem).to(device).to(memory_format=torch.channels_last).train()
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.pos_weight = torch.tensor(POS_WEIGHT, device=device)
        torch.backends.cudnn.benchmark = mode != "eager"
        if mode == "compile":
            self.model.compile(dynamic=False)
        elif not mode.startswith("eager"):
            self.model.compile(dynamic=False, mode=mode)

    def learn(self, images: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(images).squeeze(1)
        loss = F.binary_cross_entropy_with_logits(
            logits.float(), targets, pos_weight=self.pos_weight
        )
        loss.backward()
        self.optimizer.step()


# --- measuring


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    mode: str
    batch_size: int
    path: str
    """'none' is the bare step."""
    step_ms: float
    spread_ms: tuple[float, float]
    """Smallest and largest of the repeats."""
    images_per_s: float
    of_flops: float
    """Fraction of the limit that the chip's arithmetic sets."""
    of_bytes: float
    """Fraction of the limit that its memory sets."""
    data_fraction: float | None
    """What the data path adds to the bare step, as a fraction of both."""
    rsna_epoch_s: float
    peak_gb: float | None


@dataclass(frozen=True)
class Failure:
    """What could not be measured."""

    what: str
    reason: str


def time_steps(step: Step, batches: Iterator[Batch], count: int) -> float:
    """Seconds a step, by the device's own clock where it has one."""
    if step.device.type != "cuda":
        started_s = time.perf_counter()
        for images, targets in itertools.islice(batches, count):
            step.learn(images, targets)
        return (time.perf_counter() - started_s) / count
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begun.record()
    for images, targets in itertools.islice(batches, count):
        step.learn(images, targets)
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 1000 / count


def measure(
    mode: str, batch_size: int, options: argparse.Namespace
) -> tuple[list[Row], list[Failure]]:
    """The bare step and every data path, in turns; and the paths that failed.

    Raises whatever the network itself or its memory fails with.
    """
    device = torch.device(options.device)
    data = Data(options.num_images, options.image_size, batch_size, device)
    step = Step(mode, device, plain_stem=options.plain_stem)
    feeds: dict[str, Iterator[Batch]] = {"none": itertools.repeat(next(data.feed_from_device()))}
    peaks = {"none": warm_up(step, feeds["none"], options.warm_up)}
    failures = []
    for path in options.paths:
        try:
            batches = data.feed(path)
            peaks[path] = warm_up(step, batches, options.warm_up)
            feeds[path] = batches
        except Exception as error:
            failures.append(Failure(f"{mode} {batch_size} {path}", explain(error)))
    times: dict[str, list[float]] = {path: [] for path in feeds}
    for _ in range(options.repeats):
        for path, batches in feeds.items():
            times[path].append(time_steps(step, batches, data.steps))
    limit = find_limit(
        options.image_size,
        batch_size,
        sum(weights.numel() for weights in step.model.parameters()),
        tflops=options.peak_tflops,
        tb_per_s=options.peak_tb_per_s,
    )
    bare_s = statistics.median(times["none"])
    rows = [
        describe(mode, batch_size, path, found, bare_s=bare_s, limit=limit, peak_gb=peaks[path])
        for path, found in times.items()
    ]
    return rows, failures


def warm_up(step: Step, batches: Iterator[Batch], count: int) -> float | None:
    """Compile and warm up; the peak memory on the device meanwhile, in GB."""
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    time_steps(step, batches, count)
    return torch.cuda.max_memory_allocated() / 1e9 if step.device.type == "cuda" else None


def describe(
    mode: str,
    batch_size: int,
    path: str,
    times_s: Sequence[float],
    *,
    bare_s: float,
    limit: Limit,
    peak_gb: float | None,
) -> Row:
    """The row of one path's times."""
    step_s = statistics.median(times_s)
    return Row(
        mode=mode,
        batch_size=batch_size,
        path=path,
        step_ms=step_s * 1e3,
        spread_ms=(min(times_s) * 1e3, max(times_s) * 1e3),
        images_per_s=batch_size / step_s,
        of_flops=limit.by_flops_s * batch_size / step_s,
        of_bytes=limit.by_bytes_s * batch_size / step_s,
        data_fraction=None if path == "none" else (step_s - bare_s) / step_s,
        rsna_epoch_s=RSNA_IMAGES * step_s / batch_size,
        peak_gb=peak_gb,
    )


def explain(error: Exception) -> str:
    """In one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:200]}"


# --- the report

HEAD = (
    f"{'network':<27}{'batch':>6} {'data path':<16}{'ms/step':>9}{'images/s':>10}{'of FLOPs':>9}"
    f"{'of bytes':>9}{'data':>8}{'epoch s':>9}{'GB':>7}"
)


def format_row(row: Row) -> str:
    data = "-" if row.data_fraction is None else f"{row.data_fraction:.1%}"
    peak = "-" if row.peak_gb is None else f"{row.peak_gb:.1f}"
    return (
        f"{row.mode:<27}{row.batch_size:>6} {row.path:<16}{row.step_ms:>9.2f}"
        f"{row.images_per_s:>10.0f}{row.of_flops:>9.1%}{row.of_bytes:>9.1%}{data:>8}"
        f"{row.rsna_epoch_s:>9.2f}{peak:>7}"
    )


def compare_with_goals(rows: Sequence[Row]) -> list[str]:
    """The fastest epochs with and without the data path, beside the goals."""
    lines = []
    for label, found in (
        ("bare", [row for row in rows if row.path == "none"]),
        ("with its data path", [row for row in rows if row.path != "none"]),
        (
            "as pneumo trains",
            [row for row in rows if (row.mode, row.path) == ("eager-tuned", "thread")],
        ),
        (
            "as pneumo trains, compiled",
            [row for row in rows if (row.mode, row.path) == ("compile", "thread-compiled")],
        ),
    ):
        if not found:
            continue
        best = min(found, key=lambda row: row.rsna_epoch_s)
        line = f"epoch of {RSNA_IMAGES} images, {label}: {best.rsna_epoch_s:.2f} s"
        if best.data_fraction is not None:
            line += f" (goal {EPOCH_GOAL_S:.1f}), data path {best.data_fraction:.1%} of a step"
            line += f" (goal {DATA_GOAL:.0%} at most)"
        lines.append(f"{line}: {best.mode}, batch {best.batch_size}, {best.path}")
    return lines


def describe_machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__}


def find_peaks(options: argparse.Namespace) -> tuple[float, float] | None:
    """TFLOP/s and TB/s: those that were given, or the device's; None where it is not known."""
    if options.peak_tflops and options.peak_tb_per_s:
        return options.peak_tflops, options.peak_tb_per_s
    return PEAKS.get(describe_machine(torch.device(options.device))["device"])


SMOKE = {
    "num_images": 32,
    "image_size": 32,
    "batch_sizes": [8],
    "modes": ["eager"],
    "paths": ["host", "thread", "device"],
    "repeats": 2,
    "warm_up": 1,
    "device": "cpu",
    "peak_tflops": 1.0,
    "peak_tb_per_s": 0.1,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Training speed of one GPU.",
        epilog="; ".join(f"{name}: {meaning}" for name, meaning in MODES.items()),
    )
    parser.add_argument("--num-images", type=int, default=RSNA_IMAGES)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS))
    parser.add_argument("--plain-stem", action="store_true", help="the first convolution by cuDNN")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=WARM_UP_STEPS, help="steps, uncounted")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16; default: the device's")
    parser.add_argument("--peak-tb-per-s", type=float, help="of its memory; default: the device's")
    parser.add_argument("--json", type=Path, help="where the figures go, as they come")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, in seconds")
    if parser.parse_args(arguments).smoke:  # other flags still count
        parser.set_defaults(**SMOKE)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU here; --smoke shows that the script runs", file=sys.stderr)
        return 2
    machine = describe_machine(torch.device(options.device))
    peaks = find_peaks(options)
    if peaks is None:
        print(
            f"no peaks known of {machine['device']}; give --peak-tflops (dense bfloat16) and "
            "--peak-tb-per-s from its datasheet",
            file=sys.stderr,
        )
        return 2
    options.peak_tflops, options.peak_tb_per_s = peaks
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    gflop = 3 * count_forward_flops(options.image_size) / 1e9
    print(
        f"ResNet-18 at {options.image_size} px, {gflop:.2f} GFLOP an image; peaks "
        f"{options.peak_tflops:g} TFLOP/s, {options.peak_tb_per_s:g} TB/s\n{HEAD}"
    )
    rows: list[Row] = []
    failures: list[Failure] = []
    for mode, batch_size in itertools.product(options.modes, options.batch_sizes):
        try:
            found, failed = measure(mode, batch_size, options)
        except Exception as error:  # out of memory, a compiler that is not there
            found, failed = [], [Failure(f"{mode} {batch_size}", explain(error))]
        for row in found:
            print(format_row(row), flush=True)
        for failure in failed:
            print(f"{failure.what}: failed: {failure.reason}", flush=True)
        rows += found
        failures += failed
        if options.json:
            figures = {
                "machine": machine,
                "options": {k: v for k, v in vars(options).items() if k != "json"},
                "rows": [asdict(row) for row in rows],
                "failures": [asdict(failure) for failure in failures],
            }
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
        forget()
    print("\n".join(["", *compare_with_goals(rows)]))
    return 0 if rows else 1


def forget() -> None:
    """Free the memory of the last network, and its compiled code."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
