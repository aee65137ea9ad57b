"""What Grad-CAM maps cost: ours and pytorch-grad-cam's by its README, comparing a map with boxes,
and the memory of scoring."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
from torch import Tensor, nn

from jobs.evaluation.ray_scoring import (
    RunCheckpoint,
    ScoredStore,
    Scoring,
    score_maps,
    score_splits,
)
from jobs.evaluation.shown_studies import list_boxes
from jobs.ray_cluster.session import ray_session
from pneumo.config import Config, ModelConfig
from pneumo.dataset.manifest import read_manifest
from pneumo.dataset.study_table import read_studies
from pneumo.evaluation.map_scores import prior_map, score_map
from pneumo.images.boxes import Box
from pneumo.network.backbones import gradcam_layer
from pneumo.network.gradcam import Maps, build_random_network, gradcam
from pneumo.training.checkpoints import Checkpoint, claim_run, read_index, save_checkpoint
from tests.benchmarks.prepare import Sampler
from tests.conftest import write_store

GOAL_RATIO = 3.0
"""How many times as fast as the README's code ours is to be."""
_IMAGES, _SIZE, _MEMORY_SIZE = 8, 224, 64


def as_documented(model: nn.Module, images: Tensor) -> Maps:
    """pytorch-grad-cam as its README has it: gradients of everything."""
    with GradCAM(model, [gradcam_layer(model)]) as cam:
        targets = [BinaryClassifierOutputTarget(1)] * len(images)
        return np.asarray(cam(input_tensor=images.clone(), targets=targets))


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """The logits alone."""
    with torch.inference_mode():
        return torch.as_tensor(model(images))


def measure_ms(function: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds an image."""
    started_s = time.perf_counter()
    function(*arguments)
    return 1000 * (time.perf_counter() - started_s) / _IMAGES


def measure_cost(backbones: list[str], repeats: int) -> None:
    """Print ms an image on one thread, and how many times as fast ours is."""
    torch.set_num_threads(1)
    images = torch.randn(_IMAGES, 1, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0))
    print(f"one thread, {_SIZE} px, ms an image (ratio to ours)")
    functions = (forward, gradcam, as_documented)
    print(f"  {'backbone':18}" + "".join(f"{one.__name__:>24}" for one in functions))
    for backbone in backbones:
        model = build_random_network(backbone, seed=0).to(memory_format=torch.channels_last)
        # In turns, so that other load slows all of them alike.
        rounds = [
            {one: measure_ms(one, model, images) for one in functions} for _ in range(repeats)
        ]
        times = {one: min(found[one] for found in rounds) for one in functions}
        fast = times[gradcam]
        cells = [f"{times[one]:14.1f} ({times[one] / fast:5.2f} x)" for one in functions]
        print(f"  {backbone:18}" + "".join(f"{cell:>24}" for cell in cells))
        ratio = times[as_documented] / fast
        verdict = "pass" if ratio >= GOAL_RATIO else "FAIL"
        print(f"  {verdict}: {backbone} {ratio:.1f} times as fast, goal {GOAL_RATIO:g}", flush=True)
    boxes = [Box(30, 40, 50, 60)]
    maps = np.random.default_rng(0).random((_IMAGES, _SIZE, _SIZE), dtype=np.float32)

    def score() -> None:
        for cam in maps:
            score_map(cam, boxes)

    print(f"  one map of a study against its boxes: {measure_ms(score):.1f} ms")


def measure_memory(sizes: list[int]) -> None:
    """Print what driver and worker hold at most while splits of so many studies are scored."""
    print(f"logits and maps of a split, {_MEMORY_SIZE} px; MiB that are a process's own (USS)")
    print(f"  {'studies':>8} {'driver':>8} {'worker':>8} {'seconds':>8}")
    for number in sizes:
        with tempfile.TemporaryDirectory() as name:
            store, run = str(Path(name) / "store"), str(Path(name) / "run")
            Path(store).mkdir()
            write_store(Path(store), test=number, image_size=_MEMORY_SIZE, samples_per_shard=1024)
            _write_run(store, run)
            command = [sys.executable, "-m", "tests.benchmarks.explain", "score", store, run]
            started_s = time.perf_counter()
            job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            sampler = Sampler(psutil.Process(job.pid))
            sampler.start()
            assert job.wait() == 0
            seconds = time.perf_counter() - started_s
            sampler.join(5)
            held = " ".join(f"{x / 2**20:8.0f}" for x in (sampler.driver, sampler.worker))
            print(f"  {number:8} {held} {seconds:8.0f}", flush=True)


def _write_run(store_url: str, run_url: str) -> None:
    manifest = read_manifest(store_url)
    checkpoint = Checkpoint(
        model=build_random_network("resnet18", seed=0).state_dict(),
        optimizer={},
        epoch=1,
        config=Config(),
        manifest_digest=manifest.digest,
        image_size=manifest.image_size,
        mean=manifest.mean,
        std=manifest.std,
        history=({"val/auroc": 0.5},),
        initialisation="random",
        code_version="benchmark",
    )
    attempt = claim_run(run_url)
    save_checkpoint(run_url, checkpoint, attempt=attempt, keep_last=1, finished=True)


def score_store(store_url: str, run_url: str) -> None:
    """All that an evaluation asks of the workers for test."""
    scored = ScoredStore(Scoring((RunCheckpoint(run_url, read_index(run_url).best),)), store_url)
    manifest = read_manifest(store_url)
    with ray_session():
        logits = score_splits(scored, ("test",), Config())
        boxes = list_boxes(read_studies(store_url, manifest), "test")
        prior = prior_map(list(boxes.values()), manifest.image_size)
        scores = score_maps(scored, {"test": boxes}, prior, Config())
    assert len(logits) == manifest.splits["test"].samples
    assert len(scores["test"]) == len(boxes)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    cost = commands.add_parser("cost")
    cost.add_argument("--backbones", nargs="+", default=list(_backbones()))
    cost.add_argument("--repeats", type=int, default=5)
    memory = commands.add_parser("memory")
    memory.add_argument("--sizes", type=int, nargs="+", default=[2000, 20_000])
    score = commands.add_parser("score")
    score.add_argument("store")
    score.add_argument("run")
    arguments = parser.parse_args()
    if arguments.command == "score":
        score_store(arguments.store, arguments.run)
    elif arguments.command == "memory":
        measure_memory(arguments.sizes)
    else:
        measure_cost(arguments.backbones, arguments.repeats)


def _backbones() -> tuple[str, ...]:
    names: tuple[str, ...] = get_args(ModelConfig.model_fields["backbone"].annotation)
    return names


if __name__ == "__main__":
    main()
