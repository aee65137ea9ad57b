"""Augmentation depends on (seed, epoch, study) alone, and moves pixels where its matrices say."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.config import AugmentConfig
from pneumo.transforms import (
    _warp_by_grid,
    _warp_by_opencv,
    augment,
    draw_affine,
    draw_uniforms,
    normalise,
    warp,
)

STILL = AugmentConfig(rotation_degrees=0, translation_fraction=0, scale_fraction=0)

seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 1000)
study_keys = st.lists(
    st.text("0123456789abcdef", min_size=1, max_size=20), min_size=1, max_size=8, unique=True
)
amounts = st.builds(
    AugmentConfig,
    rotation_degrees=st.floats(0, 180),
    translation_fraction=st.floats(0, 0.5),
    scale_fraction=st.floats(0, 0.8),
)


def smooth_images(number: int, size: int) -> torch.Tensor:
    """(number, 1, size, size) uint8 without steps between neighbours."""
    rng = np.random.default_rng(number)
    images = [
        cv2.resize(rng.uniform(0, 255, (4, 4)), (size, size), interpolation=cv2.INTER_CUBIC)
        for _ in range(number)
    ]
    return torch.from_numpy(np.clip(np.stack(images), 0, 255).astype(np.uint8)).unsqueeze(1)


# --- draws ----------------------------------------------------------------------------------------


@given(study_keys, seeds, epochs, st.integers(1, 8))
def test_uniforms_are_in_range_and_each_studys_own(
    keys: list[str], seed: int, epoch: int, count: int
) -> None:
    u = draw_uniforms(keys, seed=seed, epoch=epoch, count=count)
    assert u.shape == (len(keys), count)
    assert ((u >= 0) & (u <= 1)).all()
    assert len(np.unique(u)) == u.size
    for i, key in enumerate(keys):
        np.testing.assert_array_equal(
            draw_uniforms([key], seed=seed, epoch=epoch, count=count)[0], u[i]
        )
    np.testing.assert_array_equal(
        draw_uniforms(keys[::-1], seed=seed, epoch=epoch, count=count), u[::-1]
    )


def test_uniforms_are_uniform_and_independent() -> None:
    u = draw_uniforms([f"{i:x}" for i in range(20_000)], seed=0, epoch=0, count=4)
    # Four standard errors of a mean, and of a correlation, of 20,000.
    assert np.abs(u.mean(axis=0) - 0.5).max() < 4 * (1 / 12 / 20_000) ** 0.5
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 4 / 20_000**0.5
    for column in u.T:
        assert np.abs(np.histogram(column, 10, (0, 1))[0] - 2000).max() < 4 * 1800**0.5


@given(study_keys, seeds, epochs)
def test_seed_and_epoch_change_every_draw(keys: list[str], seed: int, epoch: int) -> None:
    u = draw_uniforms(keys, seed=seed, epoch=epoch, count=4)
    assert (u != draw_uniforms(keys, seed=seed + 1, epoch=epoch, count=4)).all()
    assert (u != draw_uniforms(keys, seed=seed, epoch=epoch + 1, count=4)).all()


@given(amounts, seeds, epochs, st.integers(32, 256))
def test_rotation_scale_and_shift_stay_within_their_limits(
    config: AugmentConfig, seed: int, epoch: int, size: int
) -> None:
    keys = [str(i) for i in range(64)]
    matrices = draw_affine(keys, config, image_size=size, seed=seed, epoch=epoch)
    forward = np.linalg.inv(np.concatenate([matrices, np.tile([[[0, 0, 1.0]]], (64, 1, 1))], 1))
    linear = forward[:, :2, :2]
    scale = np.sqrt(np.linalg.det(linear))
    angle = np.degrees(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    center = np.array([(size - 1) / 2, (size - 1) / 2, 1.0])
    shift = (forward @ center)[:, :2] - center[:2]
    # A rotation by `angle` and a scale, nothing else.
    np.testing.assert_allclose(
        linear @ linear.transpose(0, 2, 1), scale[:, None, None] ** 2 * np.eye(2), atol=1e-9
    )
    assert np.abs(scale - 1).max() <= config.scale_fraction + 1e-9
    assert np.abs(angle).max() <= config.rotation_degrees + 1e-6
    assert np.abs(shift).max() <= config.translation_fraction * size + 1e-6
    for value, limit in (
        (scale - 1, config.scale_fraction),
        (angle, config.rotation_degrees),
        (shift, config.translation_fraction * size),
    ):
        assert np.abs(value).max() >= 0.8 * limit - 1e-6, "64 draws use the range"


# --- pictures -------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(study_keys, seeds, epochs, amounts, st.data())
def test_an_image_is_changed_the_same_way_in_any_batch(
    keys: list[str], seed: int, epoch: int, config: AugmentConfig, data: st.DataObject
) -> None:
    images = smooth_images(len(keys), 32)
    whole = augment(images, keys, config, seed=seed, epoch=epoch)
    assert whole.shape == images.shape
    assert whole.dtype == torch.float32
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 255
    order = data.draw(st.permutations(range(len(keys))))[: len(keys) // 2 + 1]
    part = augment(images[order], [keys[i] for i in order], config, seed=seed, epoch=epoch)
    assert torch.equal(part, whole[order])


def test_the_next_epoch_changes_images_in_another_way() -> None:
    images = smooth_images(4, 32)
    one, two = (augment(images, list("abcd"), AugmentConfig(), seed=0, epoch=e) for e in (0, 1))
    assert all((a - b).abs().max() > 1 for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("warp_images", [_warp_by_opencv, _warp_by_grid])
def test_nothing_is_changed_when_every_amount_is_zero(warp_images) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (3, 1, 33, 33), dtype=np.uint8))
    matrices = draw_affine(list("abc"), STILL, image_size=33, seed=0, epoch=0)
    torch.testing.assert_close(warp_images(images, matrices), images.float(), atol=1e-2, rtol=0)
    assert torch.equal(augment(images, list("abc"), STILL, seed=0, epoch=0), images.float())


@pytest.mark.parametrize("warp_images", [_warp_by_opencv, _warp_by_grid])
@pytest.mark.parametrize(
    ("matrix", "source", "target"),
    [
        ([[1, 0, 3], [0, 1, -5]], (20, 10), (17, 15)),  # out(x, y) = in(x + 3, y - 5)
        ([[0, 1, 0], [-1, 0, 40]], (20, 10), (30, 20)),  # a quarter turn about (20, 20)
        ([[-1, 0, 40], [0, -1, 40]], (11, 12), (29, 28)),  # half a turn
    ],
)
def test_a_bright_dot_goes_where_the_matrix_says(  # type: ignore[no-untyped-def]
    warp_images, matrix: list[list[int]], source: tuple[int, int], target: tuple[int, int]
) -> None:
    image = torch.zeros((1, 1, 41, 41), dtype=torch.uint8)
    image[0, 0, source[1], source[0]] = 200
    moved = warp_images(image, np.array([matrix], dtype=np.float64))[0, 0]
    assert divmod(int(moved.argmax()), 41) == (target[1], target[0])
    assert moved.max() == pytest.approx(200, abs=0.1)
    assert moved.sum() == pytest.approx(200, abs=1)


@settings(max_examples=25)
@given(amounts, seeds, st.sampled_from([32, 33, 96]))
def test_the_two_ways_agree_to_half_a_gray_level(
    config: AugmentConfig, seed: int, size: int
) -> None:
    images = smooth_images(4, size)
    matrices = draw_affine(list("abcd"), config, image_size=size, seed=seed, epoch=0)
    by_opencv, by_grid = _warp_by_opencv(images, matrices), _warp_by_grid(images, matrices)
    # Interior: where the source of the pixel lies within the image, a pixel away from its border.
    y, x = np.mgrid[:size, :size]
    places = np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    source = (matrices @ places).reshape(4, 2, size, size)
    inside = ((source >= 1) & (source <= size - 2)).all(axis=1)
    assert inside.any()
    difference = (by_opencv - by_grid)[:, 0].numpy()[inside]
    # Rounding is half a level; OpenCV's places are to 1/32 pixel, so off by 1/64 in x and in y.
    steepest = max(np.abs(np.diff(images.numpy().astype(int), axis=a)).max() for a in (2, 3))
    assert np.abs(difference).max() <= 0.51 + steepest / 32
    assert np.abs(difference).mean() <= 0.3
    assert torch.equal(warp(images, matrices), by_opencv)


def test_outside_is_black() -> None:
    images = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    shifted = np.array([[[1.0, 0.0, 10.0], [0.0, 1.0, 0.0]]])
    for out in (_warp_by_opencv(images, shifted), _warp_by_grid(images, shifted)):
        assert (out[..., 22:] == 0).all()
        torch.testing.assert_close(out[..., :22], torch.full((1, 1, 32, 22), 255.0))


# --- normalisation --------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_normalised_pixels_have_the_stated_mean_and_spread(mean: float, std: float) -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    expected = (torch.tensor([0, 128, 255], dtype=torch.float64) / 255 - mean) / std
    out = normalise(images, mean, std)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.flatten().double(), expected, atol=1e-4, rtol=1e-4)
    assert images.flatten().tolist() == [0, 128, 255]


def test_normalising_does_not_change_its_input() -> None:
    images = torch.full((1, 1, 2, 2), 51.0)
    normalise(images, 0.5, 0.25)
    assert (images == 51).all()


def test_images_without_contrast_stay_finite() -> None:
    assert torch.isfinite(normalise(torch.zeros(1, 1, 2, 2), 0.0, 0.0)).all()
