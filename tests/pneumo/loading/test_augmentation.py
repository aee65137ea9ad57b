"""Augmentation depends on (seed, epoch, study) alone, and moves pixels where its matrices say."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.config import AugmentConfig
from pneumo.loading.augmentation import (
    Tables,
    augment,
    draw_affine,
    draw_tables,
    draw_uniforms,
    normalise,
    warp,
    warp_by_grid,
    warp_by_opencv,
)
from tests.examples import examples

pytestmark = pytest.mark.processors

UNMOVED = {"rotation_degrees": 0, "translation_fraction": 0, "scale_fraction": 0}
STILL = AugmentConfig(**UNMOVED, gray_fraction=0)

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
    gray_fraction=st.floats(0, 0.5),
)


def same_gray(number: int) -> Tables:
    """Tables that change no gray level, for `number` images."""
    return np.tile(np.arange(256, dtype=np.float32), (number, 1))


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


def test_each_kind_of_change_has_draws_of_its_own() -> None:
    keys = [str(i) for i in range(100)]
    one, two = (draw_uniforms(keys, seed=0, epoch=0, count=3, kind=k) for k in ("gray", ""))
    assert not np.isin(one, two).any()


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


@examples(25)
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


@pytest.mark.parametrize("warp_images", [warp_by_opencv, warp_by_grid])
def test_nothing_is_changed_when_every_amount_is_zero(warp_images) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (3, 1, 33, 33), dtype=np.uint8))
    matrices = draw_affine(list("abc"), STILL, image_size=33, seed=0, epoch=0)
    warped = warp_images(images, matrices, same_gray(3))
    torch.testing.assert_close(warped, images.float(), atol=1e-2, rtol=0)
    assert torch.equal(augment(images, list("abc"), STILL, seed=0, epoch=0), images.float())


@pytest.mark.parametrize("warp_images", [warp_by_opencv, warp_by_grid])
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
    moved = warp_images(image, np.array([matrix], dtype=np.float64), same_gray(1))[0, 0]
    assert divmod(int(moved.argmax()), 41) == (target[1], target[0])
    assert moved.max() == pytest.approx(200, abs=0.1)
    assert moved.sum() == pytest.approx(200, abs=1)


def warp_both_ways(
    images: torch.Tensor, config: AugmentConfig, seed: int
) -> tuple[torch.Tensor, torch.Tensor, Tables]:
    keys = [str(i) for i in range(len(images))]
    matrices = draw_affine(keys, config, image_size=images.shape[-1], seed=seed, epoch=0)
    tables = draw_tables(keys, config, seed=seed, epoch=0)
    by_opencv = warp_by_opencv(images, matrices, tables)
    assert torch.equal(warp(images, matrices, tables), by_opencv)
    return by_opencv, warp_by_grid(images, matrices, tables), tables


@examples(25)
@given(amounts, seeds, st.sampled_from([32, 33, 96]))
def test_the_two_ways_differ_by_less_than_a_32nd_of_a_pixel_and_a_level(
    config: AugmentConfig, seed: int, size: int
) -> None:
    images = smooth_images(4, size)
    by_opencv, by_grid, tables = warp_both_ways(images, config, seed)
    framed = np.pad(images.numpy()[:, 0].astype(np.int64), ((0, 0), (size, size), (size, size)))
    steepest = max(np.abs(np.diff(framed, axis=axis)).max() for axis in (1, 2))
    # OpenCV's places are to 1/32 pixel, so off by 1/64 in x and in y; then both round.
    levels = int(np.ceil(0.05 + steepest / 32)) + 1
    apart = (by_opencv - by_grid).abs().flatten(1).amax(1).numpy()
    assert (apart <= (tables[:, levels:] - tables[:, :-levels]).max(axis=1) + 1e-3).all()


@settings(max_examples=25)
@given(seeds, st.sampled_from([224, 256]))
def test_the_two_ways_agree_to_a_gray_level(seed: int, size: int) -> None:
    fading = np.outer(np.hanning(size), np.hanning(size))  # no step to the black outside
    images = (smooth_images(4, size) * torch.from_numpy(fading)).to(torch.uint8)
    by_opencv, by_grid, tables = warp_both_ways(images, AugmentConfig(), seed)
    apart = (by_opencv - by_grid).abs()
    assert float(apart.max()) <= np.diff(tables).max() + 1e-3
    assert float(apart.mean()) < 0.2


@examples(25)
@given(amounts, seeds)
def test_moving_is_what_torch_does_to_half_a_level(config: AugmentConfig, seed: int) -> None:
    """Against plain grid_sample in float64, on images whose steepest step is one level."""
    images = (smooth_images(3, 96) / 16).to(torch.uint8)
    keys = list("abc")
    matrices = draw_affine(keys, config, image_size=96, seed=seed, epoch=0)
    units = np.array([[2 / 96, 0, -95 / 96], [0, 2 / 96, -95 / 96], [0, 0, 1]])
    for warp_images in (warp_by_opencv, warp_by_grid):
        moved = warp_images(images, matrices, same_gray(3))
        for image, matrix, got in zip(images, matrices, moved, strict=True):
            theta = units @ np.vstack([matrix, [0, 0, 1]]) @ np.linalg.inv(units)
            grid = torch.nn.functional.affine_grid(
                torch.from_numpy(theta[None, :2]), [1, 1, 96, 96], align_corners=False
            )
            wanted = torch.nn.functional.grid_sample(
                image[None].double(), grid, align_corners=False
            )
            steepest = 16.0  # at the border to the black outside
            assert float((got - wanted[0]).abs().max()) <= 0.5 + steepest / 32 + 1e-3


# --- gray levels ----------------------------------------------------------------------------------


@given(amounts, seeds, epochs)
def test_tables_rise_and_stay_in_range(config: AugmentConfig, seed: int, epoch: int) -> None:
    tables = draw_tables(list("abcd"), config, seed=seed, epoch=epoch)
    assert tables.shape == (4, 256)
    assert tables.dtype == np.float32
    assert (np.diff(tables) >= 0).all()
    assert 0 <= tables.min() <= tables.max() <= 255


def test_a_table_is_gamma_contrast_and_brightness_by_the_drawn_amounts() -> None:
    keys, gray = [str(i) for i in range(100)], np.arange(256) / 255
    tables = draw_tables(keys, AugmentConfig(**UNMOVED, gray_fraction=0.2), seed=0, epoch=0)
    drawn = 2 * draw_uniforms(keys, seed=0, epoch=0, count=3, kind="gray") - 1
    assert np.ptp(drawn, axis=0).min() > 1.9
    for table, (gamma, contrast, brightness) in zip(tables, drawn, strict=True):
        expected = np.clip((gray ** (1.2**gamma) - 0.5) * (1 + 0.2 * contrast) + 0.5, 0, 1)
        expected = np.clip(expected * (1 + 0.2 * brightness), 0, 1)
        np.testing.assert_allclose(table, 255 * expected, atol=1e-3)


def test_an_image_in_place_is_looked_up_in_its_table() -> None:
    images = smooth_images(3, 32)
    config = AugmentConfig(**UNMOVED)
    changed = augment(images, list("abc"), config, seed=0, epoch=0)
    tables = draw_tables(list("abc"), config, seed=0, epoch=0)
    for image, table, out in zip(images, tables, changed, strict=True):
        np.testing.assert_array_equal(out.numpy(), table[image.numpy()])


def test_outside_is_black() -> None:
    images = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8)
    shifted = np.array([[[1.0, 0.0, 10.0], [0.0, 1.0, 0.0]]])
    for warp_images in (warp_by_opencv, warp_by_grid):
        out = warp_images(images, shifted, same_gray(1))
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


@examples(25)
@given(amounts, seeds, st.floats(0.1, 0.9), st.floats(0.05, 0.5))
def test_normalising_within_the_augmentation_is_normalising_after_it(
    config: AugmentConfig, seed: int, mean: float, std: float
) -> None:
    images, keys = smooth_images(4, 32), list("abcd")
    gray = augment(images, keys, config, seed=seed, epoch=1)
    within = augment(images, keys, config, seed=seed, epoch=1, moments=(mean, std))
    assert within.dtype == torch.float32
    torch.testing.assert_close(within, normalise(gray, mean, std), atol=1e-4, rtol=1e-4)


def test_normalising_does_not_change_its_input() -> None:
    images = torch.full((1, 1, 2, 2), 51.0)
    normalise(images, 0.5, 0.25)
    assert (images == 51).all()


def test_images_without_contrast_stay_finite() -> None:
    assert torch.isfinite(normalise(torch.zeros(1, 1, 2, 2), 0.0, 0.0)).all()
