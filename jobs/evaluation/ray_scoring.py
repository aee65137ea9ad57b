"""What Ray workers do for an evaluation: logits of a slice of a split, scores of the maps of its
positives, pictures of a few studies.

A split is cut into slices of whole blocks, each study in exactly one slice. A task streams the
images of its slice and returns arrays, so memory grows only by the keys and numbers of studies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import ray
import torch

from jobs.ray_cluster.session import worker_resources
from jobs.ray_cluster.spreading import spread
from jobs.terminal.progress import Progress
from pneumo import storage
from pneumo.config import ClusterConfig, Config, DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.errors import MetricError
from pneumo.evaluation.map_scores import BoxScores, score_map
from pneumo.images.boxes import Box
from pneumo.loading.blocks import PreparedStore, Samples
from pneumo.loading.loader import open_loader, read_images
from pneumo.loading.sample_order import World
from pneumo.network.gradcam import build_random_network, gradcam
from pneumo.network.scoring import (
    Member,
    Scores,
    prepare_input,
    score_images,
    scoring_batch_size,
)
from pneumo.training.checkpoints import CheckpointEntry, load_member

T = TypeVar("T")

_SLICE_SAMPLES = 512
"""Of a CPU's task: seconds of work, so that progress is seen and a lost worker costs little. Each
GPU gets one slice, as its worker process ends with the task."""


@dataclass(frozen=True)
class RunCheckpoint:
    """One checkpoint of one run."""

    run_url: str
    entry: CheckpointEntry

    @property
    def run_name(self) -> str:
        """The last part of the run's URL."""
        return storage.last_part(self.run_url)

    @property
    def name(self) -> str:
        """`<run>/<checkpoint>`."""
        return f"{self.run_name}/{self.entry.name}"


@dataclass(frozen=True)
class Scoring:
    """How a study's logit is made: the mean over these checkpoints and views."""

    checkpoints: tuple[RunCheckpoint, ...]
    """Grad-CAM maps are made with the first."""
    views: int = 1
    """Of each image: itself, and `views` - 1 shifted copies."""

    @property
    def checkpoint_name(self) -> str:
        """For the predictions' column: `epoch-0003.pt`, of an ensemble `a/epoch-0003.pt + …`."""
        if len(self.checkpoints) == 1:
            return self.checkpoints[0].entry.name
        return " + ".join(one.name for one in self.checkpoints)

    def by_run(self) -> dict[str, Scoring]:
        """The part of each run, by its name; all runs have the same number of checkpoints."""
        urls = list(dict.fromkeys(one.run_url for one in self.checkpoints))
        return {
            name: replace(self, checkpoints=tuple(c for c in self.checkpoints if c.run_url == url))
            for url, name in zip(urls, name_runs(urls), strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """What metrics.json and predictions.parquet say of it."""
        return {
            "checkpoints": [
                {"run": one.run_name, "checkpoint": one.entry.name, "sha256": one.entry.sha256}
                for one in self.checkpoints
            ],
            "views": self.views,
        }


def name_runs(run_urls: Sequence[str]) -> list[str]:
    """The last part of each URL, with a number where two are the same."""
    names = [storage.last_part(url) for url in run_urls]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


@dataclass(frozen=True)
class ScoredStore:
    """A store, and what scores it."""

    scoring: Scoring
    store_url: str


@dataclass(frozen=True, eq=False)
class ExplainedStudy:
    """A study's stored image and its Grad-CAM map."""

    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8."""
    cam: npt.NDArray[np.float32]
    """(H, W) float32 in [0, 1], at the network's input size."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker computes."""

    device: str
    num_threads: int
    batch_size: int


# --- from the driver ------------------------------------------------------------------------------


def score_splits(scored: ScoredStore, splits: Sequence[str], config: Config) -> Scores:
    """Scores of whole splits, in no order, computed by the cluster's workers."""
    manifest = read_manifest(scored.store_url)
    settings = choose_worker_settings(config.cluster, manifest.image_size)
    calls = [
        (scored, split, world, settings)
        for split in splits
        for world in split_work(manifest.splits[split].samples, config.cluster, settings)
    ]
    total = sum(manifest.splits[split].samples for split in splits)
    progress = Progress("score", total, "studies")
    return Scores.join(list(run_tasks(_score_slice, calls, config.cluster, progress)))


def score_maps(
    scored: ScoredStore,
    boxes: Mapping[str, Mapping[str, Sequence[Box]]],
    prior: npt.NDArray[Any],
    config: Config,
) -> dict[str, BoxScores]:
    """By split, how the maps of its positives agree with their boxes.

    `boxes` are by split and key of the studies to score, `prior` is the prior map; both in pixels
    of the first checkpoint's input.
    """
    manifest = read_manifest(scored.store_url)
    settings = choose_worker_settings(config.cluster, manifest.image_size)
    # Once to the object store, not with each task.
    boxes_refs = {split: ray.put(dict(of_split)) for split, of_split in boxes.items()}
    prior_ref = ray.put(prior)
    calls = [
        (scored, split, world, settings, boxes_refs[split], prior_ref, config.seed)
        for split, of_split in boxes.items()
        if of_split
        for world in split_work(manifest.splits[split].samples, config.cluster, settings)
    ]
    total = sum(len(of_split) for of_split in boxes.values())
    parts: dict[str, list[BoxScores]] = {split: [] for split in boxes}
    progress = Progress("saliency", total, "studies")
    for split, part in run_tasks(_score_maps, calls, config.cluster, progress):
        parts[split].append(part)
    return {split: BoxScores.join(found) for split, found in parts.items()}


def explain_studies(
    scored: ScoredStore, split: str, keys: Sequence[str], config: Config
) -> dict[str, ExplainedStudy]:
    """Images and Grad-CAM maps of a few studies, by key, computed by one worker."""
    if not keys:
        return {}
    image_size = read_manifest(scored.store_url).image_size
    settings = choose_worker_settings(config.cluster, image_size)
    call = (scored, split, list(keys), settings)
    progress = Progress("explain", len(keys), "studies")
    (explained,) = run_tasks(_explain, [call], config.cluster, progress)
    return explained


def choose_worker_settings(config: ClusterConfig, image_size: int) -> WorkerSettings:
    """Device, threads and batch size of the cluster's workers."""
    device = "cuda" if "GPU" in worker_resources(config) else "cpu"
    return WorkerSettings(device, config.cpus_per_worker, scoring_batch_size(image_size))


def split_work(samples: int, config: ClusterConfig, settings: WorkerSettings) -> list[World]:
    """The slices of so many samples: at least one for each worker; on CPUs more, if they are
    large."""
    size = config.num_workers
    if settings.device == "cpu":
        size = max(size, -(-samples // _SLICE_SAMPLES))
    return [World(rank, size) for rank in range(size)]


def run_tasks(
    function: Callable[..., T],
    calls: Sequence[tuple[Any, ...]],
    config: ClusterConfig,
    progress: Progress,
) -> Iterator[T]:
    """The results of `function` for each of `calls`, as they end, at most `num_workers` at a time.

    `progress` advances by the length of a result; of a pair, by that of its second part. A task
    whose worker dies is run again.
    """
    resources, done = worker_resources(config), 0
    options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
    options["max_retries"] = config.max_failures
    with progress:
        for ended in spread(function, calls, lambda: config.num_workers, **options):
            for result in ended:
                done += len(result[1] if isinstance(result, tuple) else result)
                yield result
            progress.advance_to(done)


# --- in a worker ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # a worker process gets one task after the other
def load_members(scoring: Scoring, device: str) -> list[Member]:
    """The networks of a scoring, in its order, in evaluation mode."""
    return [load_member(one.run_url, one.entry, device) for one in scoring.checkpoints]


def _score_slice(scored: ScoredStore, split: str, world: World, settings: WorkerSettings) -> Scores:
    torch.set_num_threads(settings.num_threads)
    members = load_members(scored.scoring, settings.device)
    parts = [
        Scores(
            np.array(samples.keys, dtype=np.str_),
            score_images(members, _pictures(samples), views=scored.scoring.views),
            samples.targets.numpy().astype(np.int8),
        )
        for samples in _stream(scored.store_url, split, world, settings.batch_size)
    ]
    return Scores.join(parts)


def _score_maps(
    scored: ScoredStore,
    split: str,
    world: World,
    settings: WorkerSettings,
    boxes: Mapping[str, Sequence[Box]],
    prior: npt.NDArray[np.float64],
    seed: int,
) -> tuple[str, BoxScores]:
    torch.set_num_threads(settings.num_threads)
    (member,) = load_members(Scoring(scored.scoring.checkpoints[:1]), settings.device)
    random = build_random_network(member.backbone, seed=seed).to(settings.device)
    parts = []
    for keys, pixels in _batch_studies(scored.store_url, split, world, settings.batch_size, boxes):
        images = prepare_input(pixels, member)
        cams, randoms = gradcam(member.network, images), gradcam(random, images)
        for key, cam, other in zip(keys, cams, randoms, strict=True):
            with contextlib.suppress(MetricError):  # the driver counts the missing ones
                values = np.stack([score_map(one, boxes[key]) for one in (cam, prior, other)])
                parts.append(BoxScores(np.array([key]), values[None]))
    return split, BoxScores.join(parts)


def _batch_studies(
    store_url: str,
    split: str,
    world: World,
    batch_size: int,
    boxes: Mapping[str, Sequence[Box]],
) -> Iterator[tuple[list[str], list[npt.NDArray[np.uint8]]]]:
    """Keys and images of the slice's studies in `boxes`, in full batches but for the last."""
    keys: list[str] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    for samples in _stream(store_url, split, world, batch_size):
        for key, picture in zip(samples.keys, _pictures(samples), strict=True):
            if key in boxes:
                keys.append(key)
                pixels.append(picture)
            if len(keys) == batch_size:
                yield keys, pixels
                keys, pixels = [], []
    if keys:
        yield keys, pixels


def _stream(store_url: str, split: str, world: World, batch_size: int) -> Iterator[Samples]:
    """The samples of a slice, as they are stored."""
    # Streamed: each image is needed once.
    store = PreparedStore(store_url, read_manifest(store_url), DataConfig(cache="stream"))
    loader = open_loader(store, split, world=world, device="cpu")
    return loader.rank_slice(batch_size=batch_size)


def _pictures(samples: Samples) -> list[npt.NDArray[np.uint8]]:
    return list(samples.images[:, 0].numpy())


def _explain(
    scored: ScoredStore, split: str, keys: list[str], settings: WorkerSettings
) -> dict[str, ExplainedStudy]:
    torch.set_num_threads(settings.num_threads)
    (member,) = load_members(Scoring(scored.scoring.checkpoints[:1]), settings.device)
    found = read_images(scored.store_url, read_manifest(scored.store_url), split, keys)
    explained: dict[str, ExplainedStudy] = {}
    for start in range(0, len(keys), settings.batch_size):
        chosen = keys[start : start + settings.batch_size]
        cams = gradcam(member.network, prepare_input([found[key] for key in chosen], member))
        explained |= {
            key: ExplainedStudy(found[key], cam) for key, cam in zip(chosen, cams, strict=True)
        }
    return explained
