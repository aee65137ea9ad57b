"""What Ray workers do for an evaluation: logits of a share of a split, maps of its positives,
pictures of a few.

A split is shared out by its blocks, each to exactly one share. A share streams its batches and
gives back arrays, so neither a worker nor the driver holds more for more studies than their keys
and numbers.
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
from pneumo.config import ClusterConfig, Config, DataConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import MetricError
from pneumo.evaluation.map_scores import BoxScores, score_map
from pneumo.images.boxes import Box
from pneumo.loading.blocks import PreparedStore, Samples
from pneumo.loading.loader import open_loader, read_images
from pneumo.loading.sample_order import World
from pneumo.network.gradcam import build_random_network, gradcam
from pneumo.network.scoring import Member, Scores, prepare_input, score_pictures
from pneumo.training.checkpoints import CheckpointEntry, load_member

T = TypeVar("T")

_SHARE_SAMPLES = 512
"""Of a CPU's share: seconds of work, so that progress is seen and a lost worker costs little. A
GPU's worker process ends with its task, so it gets one share."""


@dataclass(frozen=True)
class Weights:
    """One checkpoint of one run."""

    run_url: str
    entry: CheckpointEntry

    @property
    def name(self) -> str:
        """`<run>/<checkpoint>`."""
        return f"{self.run_url.rsplit('/', 1)[-1]}/{self.entry.name}"


@dataclass(frozen=True)
class Scoring:
    """How a study's logit is made: the mean over these checkpoints and views."""

    weights: tuple[Weights, ...]
    """The first is the one whose maps are shown."""
    views: int = 1
    """Of each picture: itself, and `views` - 1 moved ones."""

    @property
    def checkpoint(self) -> str:
        """For the predictions' column: `epoch-0003.pt`, of an ensemble `a/epoch-0003.pt + …`."""
        if len(self.weights) == 1:
            return self.weights[0].entry.name
        return " + ".join(weights.name for weights in self.weights)

    def by_run(self) -> dict[str, Scoring]:
        """The part of each run, by its name; runs have equally many checkpoints."""
        urls = list(dict.fromkeys(weights.run_url for weights in self.weights))
        return {
            name: replace(self, weights=tuple(w for w in self.weights if w.run_url == url))
            for url, name in zip(urls, name_runs(urls), strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """What metrics.json and predictions.parquet say of it."""
        return {
            "checkpoints": [
                {"run": weights.run_url.rsplit("/", 1)[-1], **_describe(weights.entry)}
                for weights in self.weights
            ],
            "views": self.views,
        }


def name_runs(run_urls: Sequence[str]) -> list[str]:
    """The last part of each URL, with a number where two are the same."""
    names = [url.rsplit("/", 1)[-1] for url in run_urls]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _describe(entry: CheckpointEntry) -> dict[str, str]:
    return {"checkpoint": entry.name, "sha256": entry.sha256}


@dataclass(frozen=True)
class Scored:
    """Which weights score which store, as a worker needs to know it."""

    scoring: Scoring
    store_url: str


@dataclass(frozen=True, eq=False)
class Explained:
    """A study's picture as it is stored, and where the network saw evidence."""

    pixels: npt.NDArray[np.uint8]
    """(S, S) uint8."""
    cam: npt.NDArray[np.float32]
    """(H, W) float32 in [0, 1], at the network's input size."""


@dataclass(frozen=True)
class Place:
    """Where a task runs, and in what portions."""

    device: str
    num_threads: int
    batch_size: int


# --- from the driver ------------------------------------------------------------------------------


def score_splits(scored: Scored, splits: Sequence[str], config: Config) -> Scores:
    """Scores of whole splits, split over the cluster's workers, in no order."""
    manifest = read_manifest(scored.store_url)
    place = find_place(config.cluster, manifest.image_size)
    calls = [
        (scored, split, world, place)
        for split in splits
        for world in share_out(manifest.splits[split].samples, config.cluster, place)
    ]
    total = sum(manifest.splits[split].samples for split in splits)
    return Scores.join(list(run_shares(_score_share, calls, config.cluster, "score", total)))


def score_boxes(
    scored: Scored,
    boxes: Mapping[str, Mapping[str, Sequence[Box]]],
    prior: npt.NDArray[Any],
    config: Config,
) -> dict[str, BoxScores]:
    """By split, the maps of its positives against their boxes.

    `boxes` holds by split and key what is to be scored, `prior` is the prior map; both in pixels of
    the first checkpoint's input.
    """
    manifest = read_manifest(scored.store_url)
    place = find_place(config.cluster, manifest.image_size)
    # Once to the object store, not with each of the tasks.
    shared = {split: ray.put(dict(of_split)) for split, of_split in boxes.items()}
    shared_prior = ray.put(prior)
    calls = [
        (scored, split, world, place, shared[split], shared_prior, config.seed)
        for split, of_split in boxes.items()
        if of_split
        for world in share_out(manifest.splits[split].samples, config.cluster, place)
    ]
    total = sum(len(of_split) for of_split in boxes.values())
    parts: dict[str, list[BoxScores]] = {split: [] for split in boxes}
    for split, part in run_shares(_score_maps, calls, config.cluster, "saliency", total):
        parts[split].append(part)
    return {split: BoxScores.join(found) for split, found in parts.items()}


def explain_studies(
    scored: Scored, split: str, keys: Sequence[str], config: Config
) -> dict[str, Explained]:
    """Pictures and Grad-CAM of a few studies, by one worker."""
    if not keys:
        return {}
    image_size = read_manifest(scored.store_url).image_size
    place = find_place(config.cluster, image_size)
    call = (scored, split, list(keys), place)
    (explained,) = run_shares(_explain, [call], config.cluster, "explain", len(keys))
    return explained


def find_place(config: ClusterConfig, image_size: int) -> Place:
    """Where the cluster's workers compute, and how many pictures of so many pixels at once: 64 up
    to 224 x 224 pixels, and as many pixels of larger ones."""
    device = "cuda" if "GPU" in worker_resources(config) else "cpu"
    batch_size = min(64, max(1, 64 * 224**2 // image_size**2))
    return Place(device, config.cpus_per_worker, batch_size)


def share_out(samples: int, config: ClusterConfig, place: Place) -> list[World]:
    """The shares of so many samples: at least one a worker, on CPUs more of them if large."""
    size = config.num_workers
    if place.device == "cpu":
        size = max(size, -(-samples // _SHARE_SAMPLES))
    return [World(rank, size) for rank in range(size)]


def run_shares(
    function: Callable[..., T],
    calls: Sequence[tuple[Any, ...]],
    config: ClusterConfig,
    label: str,
    total: int,
) -> Iterator[T]:
    """What `function` gives for each of `calls`, as they end, at most `num_workers` at a time.

    A result's length (of a pair its second's) advances the progress towards `total` studies. A task
    whose worker dies is run again.
    """
    resources, done = worker_resources(config), 0
    options = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
    options["max_retries"] = config.max_failures
    with Progress(label, total, "studies") as progress:
        for ended in spread(function, calls, lambda: config.num_workers, **options):
            for result in ended:
                done += len(result[1] if isinstance(result, tuple) else result)
                yield result
            progress.advance_to(done)


# --- in a worker ----------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # a process of Ray's gets one task after the other
def load_members(scoring: Scoring, device: str) -> list[Member]:
    """The networks of a scoring, in its order, in evaluation mode."""
    return [load_member(one.run_url, one.entry, device) for one in scoring.weights]


def _score_share(scored: Scored, split: str, world: World, place: Place) -> Scores:
    torch.set_num_threads(place.num_threads)
    members = load_members(scored.scoring, place.device)
    parts = [
        Scores(
            np.array(samples.keys, dtype=np.str_),
            score_pictures(members, _pictures(samples), views=scored.scoring.views),
            samples.targets.numpy().astype(np.int8),
        )
        for samples in _stream(scored.store_url, split, world, place.batch_size)
    ]
    return Scores.join(parts)


def _score_maps(
    scored: Scored,
    split: str,
    world: World,
    place: Place,
    boxes: Mapping[str, Sequence[Box]],
    prior: npt.NDArray[np.float64],
    seed: int,
) -> tuple[str, BoxScores]:
    torch.set_num_threads(place.num_threads)
    (member,) = load_members(Scoring(scored.scoring.weights[:1]), place.device)
    random = build_random_network(member.backbone, seed=seed).to(place.device)
    parts = []
    for keys, pixels in _positives(scored.store_url, split, world, place.batch_size, boxes):
        images = prepare_input(pixels, member)
        cams, randoms = gradcam(member.network, images), gradcam(random, images)
        for key, cam, other in zip(keys, cams, randoms, strict=True):
            with contextlib.suppress(MetricError):  # the driver counts who is missing
                values = np.stack([score_map(one, boxes[key]) for one in (cam, prior, other)])
                parts.append(BoxScores(np.array([key]), values[None]))
    return split, BoxScores.join(parts)


def _positives(
    store_url: str,
    split: str,
    world: World,
    batch_size: int,
    boxes: Mapping[str, Sequence[Box]],
) -> Iterator[tuple[list[str], list[npt.NDArray[np.uint8]]]]:
    """Keys and pictures of the share's studies in `boxes`, in full batches but for the last."""
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
    """A slice of a split as it is stored, each sample in exactly one slice."""
    # Streamed: each picture is needed once.
    store = PreparedStore(store_url, read_manifest(store_url), DataConfig(cache="stream"))
    loader = open_loader(store, split, world=world, device="cpu")
    return loader.rank_slice(batch_size=batch_size)


def _pictures(samples: Samples) -> list[npt.NDArray[np.uint8]]:
    return list(samples.images[:, 0].numpy())


def _explain(scored: Scored, split: str, keys: list[str], place: Place) -> dict[str, Explained]:
    torch.set_num_threads(place.num_threads)
    (member,) = load_members(Scoring(scored.scoring.weights[:1]), place.device)
    found = read_images(scored.store_url, read_manifest(scored.store_url), split, keys)
    explained: dict[str, Explained] = {}
    for start in range(0, len(keys), place.batch_size):
        chosen = keys[start : start + place.batch_size]
        cams = gradcam(member.network, prepare_input([found[key] for key in chosen], member))
        explained |= {
            key: Explained(found[key], cam) for key, cam in zip(chosen, cams, strict=True)
        }
    return explained


def boxes_of(studies: Mapping[str, StudyRow], split: str) -> dict[str, tuple[Box, ...]]:
    """The positives of a split that have boxes, in stored pixels."""
    return {
        row.key: row.boxes
        for row in studies.values()
        if row.split == split and row.target == 1 and row.boxes
    }
