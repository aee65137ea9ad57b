"""Inference of trained networks: stored images or batches -> one logit per study."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pneumo.config import AugmentConfig
from pneumo.loading.augmentation import augment, normalise
from pneumo.loading.blocks import to_input
from pneumo.loading.loader import Batch

VIEWS = AugmentConfig()
"""Augmentation of the views of test-time augmentation; never flipped, as the heart is on the
left."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits of N studies, with keys and targets; all arrays have shape (N,)."""

    keys: npt.NDArray[np.str_]
    logits: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int8]
    """0 or 1, as in the shards."""

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The parts concatenated, in their order."""
        return cls(
            np.concatenate([np.empty(0, np.str_), *(part.keys for part in parts)]),
            np.concatenate([np.empty(0, np.float32), *(part.logits for part in parts)]),
            np.concatenate([np.empty(0, np.int8), *(part.targets for part in parts)]),
        )


def average_scores(parts: Sequence[Scores]) -> Scores:
    """The mean logit of each study over several scores of the same studies, sorted by key."""
    ordered = [np.argsort(part.keys, kind="stable") for part in parts]
    first = parts[0].keys[ordered[0]]
    for part, order in zip(parts, ordered, strict=True):
        assert np.array_equal(part.keys[order], first)
    logits = [part.logits[order] for part, order in zip(parts, ordered, strict=True)]
    mean = np.asarray(np.mean(logits, axis=0, dtype=np.float64), dtype=np.float32)
    return Scores(first, mean, parts[0].targets[ordered[0]])


def scoring_batch_size(image_size: int) -> int:
    """64 images of up to 224 x 224 pixels; of larger ones as many as have as many pixels."""
    return min(64, max(1, 64 * 224**2 // image_size**2))


def score(model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """The logits of the studies in `batches`, in their order.

    Always in float32: in bfloat16, of 8 bits, logits of different studies would be equal. To make
    validation fast, a GPU's convolutions may multiply in TF32 (10 bits) and accumulate in float32.
    The model is left in evaluation mode.
    """
    model.eval()
    keys: list[str] = []
    logits, targets = [], []
    with torch.inference_mode():
        for batch in batches:
            with torch.autocast(batch.images.device.type, enabled=False):
                logits.append(model(batch.images).squeeze(1).float())
            targets.append(batch.targets)
            keys += batch.keys
    if not keys:
        return Scores.join([])
    # Copied once: a copy to the host within the loop would block on each batch.
    return Scores(
        np.array(keys, dtype=np.str_),
        torch.cat(logits).cpu().numpy(),
        torch.cat(targets).cpu().numpy().astype(np.int8),
    )


@dataclass(frozen=True, eq=False)
class Member:
    """A trained network of an ensemble, whose logits are averaged, and the input that it takes."""

    network: nn.Module
    backbone: str
    image_size: int
    """Height and width of its input, in pixels."""
    mean: float
    """Mean gray level of its training images, in [0, 1]; likewise `std`."""
    std: float

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device


def prepare_input(pixels: Sequence[npt.NDArray[np.uint8]], member: Member) -> Tensor:
    """Stored images (S, S) uint8 -> the member's input: (B, 1, H, W) float32, normalised."""
    images = to_input(pixels, member.image_size).to(member.device)
    return normalise(images, member.mean, member.std)


def score_images(
    members: Sequence[Member], pixels: Sequence[npt.NDArray[np.uint8]], *, views: int = 1
) -> npt.NDArray[np.float32]:
    """The mean logit (B,) of stored images (S, S) uint8 over all members and `views`.

    The first view is the image itself; view k is augmented, with the same parameters for every
    image, so a study's logit depends on its pixels alone. Always in float32, also in a GPU's
    convolutions.
    """
    total = np.zeros(len(pixels), dtype=np.float64)
    with torch.inference_mode(), _exact_convolutions():
        for member in members:
            member.network.eval()
            for number in range(views):
                images = _draw_view(member, pixels, number)
                with torch.autocast(member.device.type, enabled=False):
                    logits = member.network(images).squeeze(1).float()
                total += logits.cpu().numpy()
    return np.asarray(total / (len(members) * views), dtype=np.float32)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """cuDNN convolves in float32, not TF32, inside the context; matrix products always do."""
    cudnn = torch.backends.cudnn
    was_allowed = cudnn.allow_tf32
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32 = was_allowed


def _draw_view(member: Member, pixels: Sequence[npt.NDArray[np.uint8]], number: int) -> Tensor:
    if number == 0:
        return prepare_input(pixels, member)
    images = to_input(pixels, member.image_size).to(member.device)
    # One key and the view's number as epoch: the same parameters for all images.
    keys = ["view"] * len(pixels)
    moments = (member.mean, member.std)
    return augment(images, keys, VIEWS, seed=0, epoch=number, moments=moments)
