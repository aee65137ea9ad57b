"""Checks before the first step: of the run, sizes, class weights, weights and the compiler."""

import os
import shutil
from collections.abc import Callable

import torch

from pneumo.config import Config, TrainConfig
from pneumo.config_layers import check_batch_size
from pneumo.dataset.manifest import Manifest
from pneumo.errors import ConfigError
from pneumo.loading import sample_order
from pneumo.loading.blocks import input_size
from pneumo.network.backbones import check_weights
from pneumo.training.resuming import find_newest


def check_run(config: Config, manifest: Manifest, run_url: str, *, num_workers: int) -> None:
    """Raises RunError when the run is finished or was started with other settings or on another
    store; ConfigError for sizes that do not fit, a training split of one class, and weights that a
    fresh run cannot start from.
    """
    check_sizes(config, manifest, num_workers=num_workers)
    if find_newest(config, manifest, run_url) is None:
        check_weights(config.model)


def check_sizes(config: Config, manifest: Manifest, *, num_workers: int) -> None:
    """Raises ConfigError for sizes that do not fit each other or the store, and for a training
    split of one class."""
    input_size(manifest, config.data.image_size)
    train = config.train
    check_batch_size(train.batch_size, train.micro_batch_size, num_workers)
    sample_order.steps_per_epoch(manifest.splits["train"].samples, train.batch_size)
    resolve_pos_weight(train, manifest)


def resolve_pos_weight(config: TrainConfig, manifest: Manifest) -> float:
    """`pos_weight` as a number: "balanced" is negatives / positives of the training split.

    Raises ConfigError for "balanced" where the training split has one class only.
    """
    if config.pos_weight != "balanced":
        return config.pos_weight
    train = manifest.splits["train"]
    if not 0 < train.positives < train.samples:
        raise ConfigError(
            f"train.pos_weight: balanced needs both classes, and {train.positives} of the "
            f"{train.samples} studies of the training split are positive; give a number, or "
            "prepare a store with both"
        )
    return (train.samples - train.positives) / train.positives


def has_compiler() -> bool:
    """Whether this machine has the C compiler that torch.compile calls."""
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang", "cc"))


def check_compiler(config: TrainConfig, device: torch.device, tell: Callable[[str], None]) -> None:
    """Raises ConfigError for `train.compile` without a C compiler; warns of it on a CPU."""
    if config.compile and device.type == "cpu":
        tell("warning: train.compile: on a CPU compiled steps are rarely faster")
    if config.compile and not has_compiler():
        raise ConfigError(
            "train.compile: torch.compile needs a C compiler on every worker, and none of gcc, "
            "clang, cc was found here; install one, or set --train.compile false"
        )
