"""What Ray workers do for an evaluation: logits of a share of a split, Grad-CAM of a few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import nn

from jobs.progress import Progress
from jobs.session import worker_resources
from pneumo.checkpoint import Checkpoint, CheckpointEntry, load_checkpoint
from pneumo.config import Config, DataConfig
from pneumo.explain import gradcam
from pneumo.feeds import to_input
from pneumo.loader import open_loader, read_images
from pneumo.model import build_model
from pneumo.partition import World
from pneumo.predict import score
from pneumo.shards import read_manifest
from pneumo.transforms import normalise


@dataclass(frozen=True)
class Scored:
    """Which weights score which store, as a worker needs to know it."""

    run_url: str
    entry: CheckpointEntry
    store_url: str


@dataclass(frozen=True, eq=False)
class Explained:
    """A study's picture as it is stored, and where the network saw evidence."""

    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8."""
    cam: npt.NDArray[np.float32]
    """(H, W) float32 in [0, 1], at the network's input size."""


def score_splits(scored: Scored, splits: Sequence[str], config: Config) -> dict[str, float]:
    """Logits by study key of whole splits, shared out to the cluster's workers."""
    resources = worker_resources(config.cluster)
    task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=3)(
        _score_share
    )
    size = config.cluster.num_workers
    running = [
        task.remote(
            scored,
            split,
            World(rank, size),
            config.evaluate.batch_size_per_worker,
            "cuda" if "GPU" in resources else "cpu",
            config.cluster.cpus_per_worker,
        )
        for split in splits
        for rank in range(size)
    ]
    logits: dict[str, float] = {}
    total, done, count = len(running), 0, 0
    with Progress("score", total, "shares") as progress:
        while running:
            ready, running = ray.wait(running, timeout=1.0)
            for reference in ready:
                share: dict[str, float] = ray.get(reference)
                count += len(share)
                logits |= share
                done += 1
            progress.advance_to(done)
    if count != len(logits):
        raise AssertionError(f"{count} scores of {len(logits)} studies")
    return logits


def explain_studies(
    scored: Scored, split: str, keys: Sequence[str], config: Config
) -> dict[str, Explained]:
    """Pictures and Grad-CAM of a few studies, by one worker."""
    if not keys:
        return {}
    resources = worker_resources(config.cluster)
    task = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_retries=3)(
        _explain
    )
    device = "cuda" if "GPU" in resources else "cpu"
    explained: dict[str, Explained] = ray.get(
        task.remote(scored, split, list(keys), device, config.cluster.cpus_per_worker)
    )
    return explained


def _score_share(
    scored: Scored, split: str, world: World, batch_size: int, device: str, num_threads: int
) -> dict[str, float]:
    torch.set_num_threads(num_threads)
    checkpoint, network = _load(scored, device)
    share = open_loader(
        scored.store_url,
        read_manifest(scored.store_url),
        split,
        DataConfig(cache="stream"),  # each picture is needed once
        image_size=checkpoint.image_size,
        mean=checkpoint.mean,
        std=checkpoint.std,
        world=world,
        device=device,
    )
    scores = score(network, share.evaluation(batch_size=batch_size))
    return dict(zip(scores.keys, scores.logits.tolist(), strict=True))


def _explain(
    scored: Scored, split: str, keys: list[str], device: str, num_threads: int
) -> dict[str, Explained]:
    torch.set_num_threads(num_threads)
    checkpoint, network = _load(scored, device)
    found = read_images(scored.store_url, read_manifest(scored.store_url), split, keys)
    pixels = [found[key] for key in keys]
    images = normalise(
        to_input(pixels, checkpoint.image_size).to(device), checkpoint.mean, checkpoint.std
    )
    cams = gradcam(network, images)
    return {
        key: Explained(image, np.asarray(cam, dtype=np.float32))
        for key, image, cam in zip(keys, pixels, cams, strict=True)
    }


def _load(scored: Scored, device: str) -> tuple[Checkpoint, nn.Module]:
    checkpoint = load_checkpoint(scored.run_url, scored.entry)
    network = build_model(checkpoint.config.model.backbone)
    network.load_state_dict(checkpoint.scored_model)
    network.to(device)
    network.to(memory_format=torch.channels_last)
    return checkpoint, network.eval()
