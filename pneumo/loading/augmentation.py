"""Batched augmentation and normalisation, on the device of the batch.

A study's random parameters are a pure function of (seed, epoch, key), so it gets the same
augmentation on any rank. An affine matrix and a look-up table of gray levels are drawn for each
sample on the CPU, and applied in this order: by OpenCV on a CPU (several times as fast there), by
`grid_sample` and indexing on a GPU. Both round an interpolated pixel to a whole gray level before
the look-up, and agree to one level except at hard edges: OpenCV's coordinates have steps of 1/32.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pneumo.config import AugmentConfig
from pneumo.loading.prefetch import to_device

Matrices = npt.NDArray[np.float64]
Tables = npt.NDArray[np.float32]


def draw_uniforms(
    keys: Sequence[str], *, seed: int, epoch: int, count: int, kind: str = ""
) -> npt.NDArray[np.float64]:
    """(B, count) uniforms in [0, 1], from BLAKE2 of (seed, epoch, key) alone; `count` up to 8.

    Each `kind` has independent numbers, so switching one augmentation on changes no other.
    """
    person = kind.encode()
    rows = [
        np.frombuffer(
            hashlib.blake2b(
                f"{seed}/{epoch}/{key}".encode(), digest_size=8 * count, person=person
            ).digest(),
            "<u8",
        )
        for key in keys
    ]
    return np.stack(rows).astype(np.float64) / 2**64


def draw_affine(
    keys: Sequence[str], config: AugmentConfig, *, image_size: int, seed: int, epoch: int
) -> Matrices:
    """(B, 2, 3) matrices from output to input pixels (x, y): rotation, scale, translation.

    The rotation is about the image's centre; pixel centres are at whole coordinates.
    """
    u = 2 * draw_uniforms(keys, seed=seed, epoch=epoch, count=4) - 1
    angle = np.deg2rad(config.rotation_degrees) * u[:, 0]
    scale = 1 + config.scale_fraction * u[:, 1]
    shift = config.translation_fraction * image_size * u[:, 2:4]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    center = (image_size - 1) / 2
    matrices = np.empty((len(u), 2, 3))
    matrices[:, 0, 0], matrices[:, 0, 1] = cos, sin
    matrices[:, 1, 0], matrices[:, 1, 1] = -sin, cos
    moved = center + shift  # the output pixel whose source is the centre
    matrices[:, 0, 2] = center - cos * moved[:, 0] - sin * moved[:, 1]
    matrices[:, 1, 2] = center + sin * moved[:, 0] - cos * moved[:, 1]
    return matrices


def draw_tables(keys: Sequence[str], config: AugmentConfig, *, seed: int, epoch: int) -> Tables:
    """(B, 256) float32 in [0, 255]: each gray level after gamma, contrast and brightness.

    As in torchvision's ColorJitter, brightness multiplies, so black stays black. Contrast scales
    around middle gray, not around the image's mean, which letterbox borders would lower.
    """
    u = 2 * draw_uniforms(keys, seed=seed, epoch=epoch, count=3, kind="gray")[:, :, None] - 1
    gamma = (1 + config.gray_fraction) ** u[:, 0]
    contrast, brightness = 1 + config.gray_fraction * u[:, 1], 1 + config.gray_fraction * u[:, 2]
    gray = (np.arange(256) / 255) ** gamma
    gray = np.clip((gray - 0.5) * contrast + 0.5, 0, 1) * brightness
    return np.asarray(np.clip(gray, 0, 1) * 255, dtype=np.float32)


def warp(images: Tensor, matrices: Matrices, tables: Tables, *, compiled: bool = False) -> Tensor:
    """`images` (B, 1, H, H) uint8, transformed by `matrices` (B, 2, 3), then gray levels looked up
    in `tables` (B, 256). Returns (B, 1, H, H) float32.

    Bilinear, rounded to a gray level; outside the image it is level 0. `compiled`: on a GPU one
    kernel of torch.compile, in a sixth of the time.
    """
    if images.device.type == "cpu":
        return warp_by_opencv(images, matrices, tables)
    return warp_by_grid(images, matrices, tables, compiled=compiled)


def warp_by_opencv(images: Tensor, matrices: Matrices, tables: Tables) -> Tensor:
    flat = images[:, 0].numpy()
    moved = np.empty(flat.shape[1:], dtype=np.uint8)
    out = np.empty(flat.shape, dtype=np.float32)
    for i, (image, matrix, table) in enumerate(zip(flat, matrices, tables, strict=True)):
        # uint8 takes a third of the time of float32.
        cv2.warpAffine(
            image,
            matrix,
            image.shape[::-1],
            dst=moved,
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        )
        cv2.LUT(moved, table, dst=out[i])
    return torch.from_numpy(out).unsqueeze(1)


def warp_by_grid(
    images: Tensor, matrices: Matrices, tables: Tables, *, compiled: bool = False
) -> Tensor:
    side = images.shape[-1]
    # From pixels to grid_sample's [-1, 1], which are the outer edges of the outer pixels.
    to_unit = np.array(
        [[2 / side, 0, (1 - side) / side], [0, 2 / side, (1 - side) / side], [0, 0, 1]]
    )
    full = np.concatenate([matrices, np.tile([[[0.0, 0.0, 1.0]]], (len(matrices), 1, 1))], axis=1)
    theta = (to_unit @ full @ np.linalg.inv(to_unit))[:, :2].astype(np.float32)
    apply = _compile_grid() if compiled else _apply_grid
    return apply(
        images,
        to_device(torch.from_numpy(theta), images.device),
        to_device(torch.from_numpy(tables), images.device),
    )


def _apply_grid(images: Tensor, theta: Tensor, levels: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
    return levels.gather(1, moved.round_().flatten(1).long()).reshape(images.shape)


@cache
def _compile_grid() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(_apply_grid, dynamic=False)


def augment(
    images: Tensor,
    keys: Sequence[str],
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    moments: tuple[float, float] | None = None,
    compiled: bool = False,
) -> Tensor:
    """`images` (B, 1, H, H) uint8 -> float32, randomly augmented; `compiled` as for `warp`.

    Gray levels in [0, 255], or normalised where `moments`, the training set's mean and standard
    deviation in [0, 1], are given: the look-up tables then normalise too, at no cost.
    """
    matrices = draw_affine(keys, config, image_size=images.shape[-1], seed=seed, epoch=epoch)
    tables = draw_tables(keys, config, seed=seed, epoch=epoch)
    if moments is not None:
        mean, std = moments
        tables = ((tables / 255.0 - mean) / max(std, 1e-6)).astype(np.float32)
    return warp(images, matrices, tables, compiled=compiled)


def normalise(images: Tensor, mean: float, std: float) -> Tensor:
    """Gray levels (B, 1, H, W) in [0, 255] -> float32 with the training set's mean 0 and std 1."""
    return (images / 255.0).sub_(mean).div_(max(std, 1e-6))
