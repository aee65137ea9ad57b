"""Drawing phantom chest X-rays: a study's description -> pixels and true boxes.

Anatomy is in units of the image height, x from the midline and y from the top, and is drawn on 512
x 512 pixels; noise is added at 1024 x 1024.
"""

import math
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pneumo.dataset.phantoms.population import PhantomStudy, generator
from pneumo.images.boxes import Box

Field = NDArray[np.float32]  # (512, 512), one value per pixel
Points = NDArray[np.float64]  # (P, 2), or lines (L, P, 2), in image heights

IMAGE_SIDE_PX = 1024
_SIDE = 512
_T = np.linspace(0, 1, 24)  # parameter along a curve

_LUNG = np.array([
    (0.165, 0.13), (0.275, 0.175), (0.345, 0.3), (0.39, 0.46), (0.415, 0.64), (0.425, 0.78),
    (0.42, 0.85), (0.35, 0.79), (0.26, 0.75), (0.17, 0.75), (0.09, 0.79), (0.04, 0.74),
    (0.04, 0.4), (0.07, 0.17),
])  # fmt: skip
# Vena cava and right atrium on the image's left, aorta and left ventricle on its right.
_MEDIASTINUM = np.array([
    (-0.05, -0.2), (-0.06, 0.3), (-0.068, 0.44), (-0.1, 0.55), (-0.116, 0.66), (-0.05, 0.84),
    (0.2, 0.86), (0.25, 0.76), (0.225, 0.66), (0.12, 0.5), (0.075, 0.39), (0.1, 0.33),
    (0.085, 0.27), (0.05, 0.18), (0.05, -0.2),
])  # fmt: skip
_TORSO = np.array([
    (0.1, -0.25), (0.1, -0.03), (0.15, 0.035), (0.3, 0.055), (0.44, 0.09), (0.53, 0.2),
    (0.485, 0.4), (0.475, 0.7), (0.49, 0.9), (0.5, 1.4), (-0.2, 1.4), (-0.2, -0.25),
])  # fmt: skip


def render_study(
    study: PhantomStudy, *, with_opacity: bool = True
) -> tuple[NDArray[np.uint8], tuple[Box, ...]]:
    """Pixels (1024, 1024) uint8, bright is dense, and a box per opacity.

    They depend on `study` alone, to the byte for given versions of numpy and OpenCV. Without the
    opacity everything else is unchanged, even the noise.
    """
    pose, signs, opacity, film = (
        generator(study.seed, study.patient, 1 + study.index, stream) for stream in range(1, 5)
    )
    person = generator(study.seed, study.patient, 0)  # the same for all studies of a patient
    portable = study.view == "AP"  # at the bedside
    canvas = _Canvas(person, pose, portable)
    large = study.finding != "Normal" and signs.random() < 0.3
    heart = (1.15 if portable else 1.0) * (signs.uniform(1.15, 1.45) if large else 1.0)
    lungs, air, solid = _draw_chest(person, study, canvas, heart)
    kept, extra = _draw_signs(signs, study, canvas, np.maximum(*lungs))
    boxes = []
    if study.positive and with_opacity:
        count = int(opacity.choice(4, p=(0.435, 0.543, 0.020, 0.002))) + 1  # as in RSNA
        # From nearly invisible to a white lung, so that no threshold separates the positives.
        strength, first = 0.1 + 0.9 * opacity.beta(1.4, 1.1), int(opacity.integers(2))
        for i in range(count):
            field, box = _draw_opacity(opacity, lungs[(first + i) % 2], 0.6 if count > 2 else 1.0)
            kept *= 1 - min(strength * opacity.uniform(0.8, 1.2), 0.9) * field
            boxes.append(box)
    return _expose(film, solid - air * kept + extra, portable), tuple(boxes)


class _Canvas:
    """Draws the anatomy of one patient in pixels."""

    def __init__(self, person: Generator, pose: Generator, portable: bool) -> None:
        """Draws size, position and rotation at random; they vary more at the bedside."""
        angle = np.radians(pose.normal(0, 2.2 if portable else 1.2))
        scale = _SIDE * pose.normal(0.93 if portable else 0.98, 0.04)
        size = person.uniform((0.88, 0.9), 1.06) * (1, pose.normal(0.93 if portable else 1, 0.04))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.axes = scale * turn * size
        self.origin = _SIDE * pose.normal((0.5, 0.06 if portable else 0.03), (0.018, 0.025))

    def project(self, points: Points) -> NDArray[np.int32]:
        """Points in 1/16 pixels, OpenCV's fixed-point coordinates."""
        return np.round((points @ self.axes.T + self.origin) * 16).astype(np.int32)

    def fill(self, outline: Points, blur_px: float, *, twice: bool = False) -> Field:
        """The inside of a closed curve with rounded corners, 0 to 1; `twice`: mirrored as well."""
        canvas = np.zeros((_SIDE, _SIDE), np.uint8)
        for _ in range(3):  # Chaikin 1974
            after = np.roll(outline, -1, 0)
            cut = (0.75 * outline + 0.25 * after, 0.25 * outline + 0.75 * after)
            outline = np.stack(cut, 1).reshape(-1, 2)
        for points in _both_sides(outline) if twice else [outline]:
            cv2.fillPoly(canvas, [self.project(points)], 255, cv2.LINE_AA, shift=4)
        return _blur(canvas, blur_px)

    def stroke(self, lines: Any, width: float, blur_px: float = 1.1, *, rim: float = 0) -> Field:
        """Curves (L, P, 2), `width` in image heights; `rim` > 0: bright edges, as of bones."""
        canvas = np.zeros((_SIDE, _SIDE), np.uint8)
        scale = np.linalg.norm(self.axes[:, 0])
        pixels = list(self.project(np.asarray(lines)))
        for part, gray in ((1.0, 255), (0.6, round(255 * (1 - rim))))[: 2 if rim else 1]:
            thickness = max(1, round(width * part * scale))
            cv2.polylines(canvas, pixels, False, gray, thickness, cv2.LINE_AA, shift=4)
        return _blur(canvas, blur_px)


def _both_sides(points: Points) -> list[Points]:
    return [points * (side, 1) for side in (-1, 1)]


def _ellipse(x: float, y: float, a: float, b: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], 1)


def _arc(x0: float, y0: float, x1: float, y1: float, sag: float = 0) -> Points:
    return np.stack([x0 + (x1 - x0) * _T, y0 + (y1 - y0) * _T + sag * np.sin(np.pi * _T)], 1)


def _blur(field: NDArray[Any], sigma_px: float) -> Field:
    """Gaussian blur; uint8 becomes 0 to 1. A wide blur is computed at a lower resolution, at a
    tenth of the cost."""
    factor = 1 if sigma_px < 2 else 2 if sigma_px < 4 else 4 if sigma_px < 12 else 8
    side = _SIDE // factor
    small = cv2.resize(field, (side, side), interpolation=cv2.INTER_AREA)
    small = small * np.float32(1 / 255 if field.dtype == np.uint8 else 1)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / factor)
    return np.asarray(cv2.resize(small, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC))


def _clouds(rng: Generator, cells: int) -> Field:
    """Smooth noise of mean 0 and standard deviation about 1, from a grid of `cells` x `cells`."""
    coarse, fine = (rng.standard_normal((n, n), np.float32) for n in (cells, 4 * cells))
    both = cv2.resize(coarse, fine.shape, interpolation=cv2.INTER_CUBIC) + 0.6 * fine
    return np.asarray(cv2.resize(both, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC))


def _draw_chest(
    person: Generator, study: PhantomStudy, canvas: _Canvas, heart: float
) -> tuple[list[Field], Field, Field]:
    """Masks of the lungs beside the heart (the image's left, right), the density that air removes,
    and the density of everything else; all (512, 512) in 0 to 1."""
    lungs = [canvas.fill(outline, 1.6) for outline in _both_sides(_LUNG)]
    lung = np.maximum(*lungs)
    grown = 1 + (person.normal(heart, 0.08) - 1) * np.clip((_MEDIASTINUM[:, 1] - 0.4) / 0.2, 0, 1)
    center = canvas.fill(_MEDIASTINUM * np.stack([grown, np.ones_like(grown)], 1), 2.2)
    # The heart's lower border is invisible in the abdomen, its vessels' upper end in the neck.
    visible = np.clip(3.5 * _blur(lung, 40), 0, 1)
    girth, breast = person.uniform((0.95, 0.3), (1.2, 1.0)).tolist()
    arms = _both_sides(np.array([(0.45, 0.14), (0.57 * girth, 0.4), (0.67 * girth, 1.0)]))
    torso = canvas.fill(_TORSO * (girth, 1), 2, twice=True)
    body = np.maximum(torso, 0.85 * canvas.stroke(arms, 0.15, 2))
    solid = 0.02 + body * (0.1 + 0.48 * np.clip(1.15 * _blur(body, 36), 0, 1) ** 1.5)
    solid += 0.19 * center * visible + 0.2 * canvas.fill(_ellipse(0, 1.12, 0.5, 0.36), 26)
    if study.sex == "F":
        solid += 0.075 * breast * canvas.fill(_ellipse(0.23, 0.7, 0.16, 0.15), 5, twice=True)
    solid *= 1 + 0.05 * _clouds(person, 5)
    ends = person.uniform((0.13, 0.15), (0.39, 0.75), (120, 2))
    ends[::2, 0] *= -1
    bent = zip(ends, person.normal(0, 0.02, 120), strict=True)
    trees = [_arc(math.copysign(0.085, x), 0.43, x, y, sag) for (x, y), sag in bent]
    vessels = 0.05 * canvas.stroke(trees[::3], 0.006) + 0.035 * canvas.stroke(trees, 0.003)
    vessels += 0.06 * canvas.fill(_ellipse(0.098, 0.43, 0.024, 0.055), 5, twice=True)
    solid += lung * (vessels * (1 - 0.7 * center) + 0.014 * _clouds(person, 48))
    solid += _draw_bones(person, canvas, _blur(lung, 8))
    air = lung * (0.25 + 0.16 * np.minimum(1.2 * _blur(lung, 26), 1)) * (1 - 0.86 * center)
    return [side * (1 - 0.8 * center) for side in lungs], air, solid


def _draw_bones(person: Generator, canvas: _Canvas, cage: Field) -> Field:
    """Density of ribs, within the blurred lungs `cage`, clavicles and spine, minus the trachea."""
    pitch, slope, rise = person.uniform((0.066, 0.1, 0.0), (0.08, 0.2, 0.08)).tolist()
    back, front = [], []
    for k in range(11):
        y, reach = 0.125 + k * pitch, min(0.225 + 0.05 * k, 0.425)
        out = 0.03 + (reach - 0.03) * np.sin(_T * np.pi / 2)
        fall = y - 0.03 * np.sin(np.pi * _T) + slope * _T**2.2
        back += _both_sides(np.stack([out, fall], 1))
        front += _both_sides(_arc(reach, y + slope, 0.13, y + slope + 0.07 + 0.016 * k))
    ribs = canvas.stroke(back, 0.022, rim=0.4) + 0.6 * canvas.stroke(front[:14], 0.027, rim=0.4)
    clavicles = _both_sides(_arc(0.03, 0.2, 0.33, 0.115 - rise, 0.02))
    bones = 0.075 * np.clip(2.2 * cage, 0, 1) * ribs
    bones += 0.085 * canvas.stroke(clavicles, 0.026, rim=0.35)
    bones += 0.08 * canvas.stroke([_arc(0, -0.1, 0, 1.1)], 0.07, 4)
    return np.asarray(bones - 0.07 * canvas.stroke([_arc(0, -0.1, -0.004, 0.31)], 0.036, 2.5))


def _draw_signs(
    rng: Generator, study: PhantomStudy, canvas: _Canvas, lung: Field
) -> tuple[Field, Field]:
    """Signs other than pneumonia: the fraction of air left, and densities to add, (512, 512) each.
    Leads depend on the view, all else on the finding."""
    chance = {"Normal": 0.0, "Lung Opacity": 0.3}.get(study.finding, 0.4)
    kept, extra = np.ones_like(lung), np.zeros_like(lung)
    if rng.random() < chance:  # effusion: homogeneous, with a meniscus along the chest wall
        for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
            edge = [(0.05, 0.04), (0.2, 0.035), (0.32, 0), (0.41, -0.13), (0.5, 0.4), (0.05, 0.4)]
            outline = np.add(edge, (0, rng.uniform(0.6, 0.8))) * (side, 1)
            kept *= 1 - rng.uniform(0.4, 0.9) * canvas.fill(outline, 7)
    if rng.random() < chance:  # congestion: haze, symmetric
        haze = canvas.fill(_ellipse(0.13, 0.45, 0.11, 0.2), 24, twice=True)
        haze = haze * (0.8 + 0.25 * _clouds(rng, 8))
        kept *= 1 - rng.uniform(0.08, 0.4) * np.clip(haze, 0, 1)
    for _ in range(rng.integers(1, 4) if rng.random() < chance else 0):  # nodules
        x, y = rng.choice([-1, 1]) * rng.uniform(0.13, 0.3), rng.uniform(0.25, 0.7)
        nodule = _ellipse(x, y, *[rng.uniform(0.008, 0.025)] * 2)
        extra += rng.uniform(0.08, 0.2) * lung * canvas.fill(nodule, 2)
    if rng.random() < (0.75 if study.view == "AP" else 0.08):
        starts = rng.uniform((-0.38, 0.08), (0.38, 0.7), (rng.integers(1, 5), 2))
        leads = [_arc(x, y, rng.uniform(-0.6, 0.6), 1.1, rng.normal(0, 0.2)) for x, y in starts]
        extra += 0.1 * canvas.stroke(leads, 0.003)
        extra += 0.25 * canvas.stroke(starts[:, None] + np.zeros((2, 2)), 0.022)  # electrodes
    return kept, extra


def _draw_opacity(rng: Generator, lung: Field, size: float) -> tuple[Field, Box]:
    """One consolidation (512, 512), 0 to 1, in the lung, and the box around it."""
    rows, columns = np.nonzero(lung > 0.5)
    y = rows[int(len(rows) * rng.random() ** 0.7)]  # rows are sorted: lower zones are more frequent
    row = columns[rows == y]
    x = 0.6 * rng.choice(row) + 0.4 * row.mean()
    axes = rng.lognormal(np.log((0.13, 0.2)), (0.25, 0.42))
    a, b = (size * _SIDE * np.clip(axes, 0.05, (0.22, 0.4))).tolist()
    v, u = np.ogrid[0:_SIDE, 0:_SIDE]
    radius = np.hypot((u - x) / a, (v - y) / b).astype(np.float32)
    field = np.clip((1 - radius + 0.3 * np.maximum(_clouds(rng, 8), -2)) / 0.7, 0, 1)
    field = _blur(field * lung * np.clip(0.75 + 0.25 * _clouds(rng, 16), 0.2, 1.2), 1.5)
    field /= field.max()
    # As radiologists draw it: around the visible part, with a margin.
    rows, columns = np.nonzero((field > 0.3) & (radius < 1.35))
    ends = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    ends = ends * (IMAGE_SIDE_PX / _SIDE) + rng.uniform(0, 10, 4) * (-1, -1, 1, 1)
    x0, y0, x1, y1 = (float(end) for end in np.clip(np.round(ends), 0, IMAGE_SIDE_PX))
    return field, Box(x0, y0, x1 - x0, y1 - y0)


def _expose(rng: Generator, density: Field, portable: bool) -> NDArray[np.uint8]:
    """Densities to pixels: contrast, scatter, noise, side marker, black borders."""
    gain, gamma = rng.normal(0.95 if portable else 1.0, 0.1), math.exp(rng.normal(0.0, 0.2))
    # At the bedside, without an anti-scatter grid, scatter reduces the contrast more.
    scatter = rng.uniform(0.0, 0.35 if portable else 0.2)
    density = (1 - scatter) * density + scatter * _blur(density, 60)
    film = np.clip(gain * density + rng.normal(0.0, 0.03), 0, 1.3) ** gamma
    film = 255 / math.tanh(1.25) * np.tanh(1.2 * film)  # compressed, so that bone does not clip
    film = cv2.resize(film, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    grain = np.frombuffer(rng.bytes(IMAGE_SIDE_PX**2), np.uint8).reshape(film.shape)
    grain = cv2.GaussianBlur(grain, (3, 3), 0.7).astype(np.float32)
    strength = rng.uniform(0.02, 0.07)
    noisy = cv2.addWeighted(film, 1, grain, strength, -127.5 * strength)
    pixels = np.asarray(cv2.convertScaleAbs(noisy), np.uint8)
    x, y = rng.integers((20, 70), (110, 220)).tolist()
    x, letter = (x, "R") if rng.random() < 0.2 else (IMAGE_SIDE_PX - 50 - x, "L")
    cv2.putText(pixels, letter, (x, y), cv2.FONT_HERSHEY_DUPLEX, 1.7, 235, 4, cv2.LINE_AA)
    for edge in np.flatnonzero(rng.random(4) < 0.15).tolist():
        np.rot90(pixels, edge)[: rng.integers(4, 40)] = rng.integers(0, 12)
    return pixels
