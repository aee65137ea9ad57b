"""The pictures of phantom chest X-rays: a study's description -> pixels and true boxes.

Every picture is drawn from (seed, patient index, study index), so it depends on nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Finding = Literal["Lung Opacity", "No Lung Opacity / Not Normal", "Normal"]
View = Literal["AP", "PA"]
Field = NDArray[np.float32]  # (512, 512), a quantity over the picture
Points = NDArray[np.float64]  # (P, 2), x from the midline and y from the top, in image heights

IMAGE_SIDE_PX = 1024
_SIDE = 512  # the side drawn; doubled at the end, when the film noise is added
# Streams of random numbers of one study: a change in one leaves the others as they were.
HEADER, POSE, SIGNS, OPACITY, FILM = range(5)
_BOX_COUNT_SHARES = (0.435, 0.543, 0.020, 0.002)  # as in the real positives


@dataclass(frozen=True)
class Anatomy:
    """What the images of one patient share; lengths are factors or fractions of the image."""

    width: float
    height: float
    habitus: float  # the body's width beyond the ribs: below 1 slim, above 1 stout
    heart: float
    right_dome: float
    left_dome: float
    rib_pitch: float
    rib_slope: float
    clavicle_slope: float
    spine_bend: float
    breast: float
    vessel_seed: int


@dataclass(frozen=True)
class PhantomPatient:
    """A patient: `age` in years, `severity` a standard normal score that is high for the sick.

    The last patient of a population may have fewer than `num_studies` in it.
    """

    index: int
    sex: Literal["M", "F"]
    age: int
    num_studies: int
    severity: float
    anatomy: Anatomy


@dataclass(frozen=True)
class PhantomStudy:
    """One image to be: its labels and header values; the pixels follow from it alone."""

    seed: int
    patient: PhantomPatient
    index: int
    name: str  # the UUID that Kaggle calls patientId
    finding: Finding
    view: View
    age: int
    pixel_spacing_mm: float
    sop_uid: str
    series_uid: str
    study_uid: str

    @property
    def positive(self) -> bool:
        """Whether the study's Target is 1."""
        return self.finding == "Lung Opacity"


@dataclass(frozen=True)
class Box:
    """A box around an opacity, in pixels of the 1024x1024 image; x and y are its top left."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Phantom:
    """A rendered study: `pixels` (1024, 1024) uint8, bright is dense; one box an opacity."""

    pixels: NDArray[np.uint8]
    boxes: tuple[Box, ...]


def generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def stream(study: PhantomStudy, *key: int) -> np.random.Generator:
    return generator(study.seed, study.patient.index, study.index, *key)


@dataclass(frozen=True)
class _Pose:
    """How the patient stands before the film: anatomy to canvas pixels, depth of breath, view."""

    matrix: NDArray[np.float64]  # (2, 3)
    breath: float
    portable: bool

    def project(self, points: Points) -> Points:
        return points @ self.matrix[:, :2].T + self.matrix[:, 2]


def _draw_pose(study: PhantomStudy) -> _Pose:
    rng = stream(study, POSE)
    portable = study.view == "AP"
    angle = np.radians(rng.normal(0, 2.2 if portable else 1.2))
    scale = _SIDE * rng.normal(0.93 if portable else 0.98, 0.04)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    x, y = _SIDE * rng.normal(0.5, 0.018), _SIDE * rng.normal(0.04 if portable else 0.01, 0.025)
    matrix = np.array([[cos, -sin, x], [sin, cos, y]])
    return _Pose(matrix, rng.normal(0.93 if portable else 1.0, 0.04), portable)


def _smooth(points: Points, *, closed: bool) -> Points:
    """Run a Catmull-Rom curve through the points, eight steps to a span."""
    before = np.roll(points, 1, 0) if closed else np.vstack([points[:1], points[:-1]])
    after = np.roll(points, -1, 0) if closed else np.vstack([points[1:], points[-1:]])
    beyond = np.roll(points, -2, 0) if closed else np.vstack([points[2:], points[-1:], points[-1:]])
    t = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None, :] for p in (before, points, after, beyond))
    curve = 0.5 * (
        2 * p1
        + (p2 - p0) * t
        + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
        + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    )
    return np.asarray(curve.reshape(-1, 2))


def _blur(field: NDArray[Any], sigma_px: float) -> Field:
    """Blur; a wide blur is done on a smaller field, where it costs a tenth.

    A canvas (uint8, 0 to 255) is blurred as such, which is quicker again; the result is 0 to 1.
    """
    scale = np.float32(1 / 255 if field.dtype == np.uint8 else 1)
    if sigma_px < 2:
        return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma_px) * scale, np.float32)
    factor = 2 if sigma_px < 4 else 4 if sigma_px < 12 else 8
    small = cv2.resize(field, (_SIDE // factor, _SIDE // factor), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small * scale, (0, 0), sigma_px / factor)
    return np.asarray(cv2.resize(small, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC), np.float32)


def _fill(pose: _Pose, *outlines: Points, blur_px: float) -> Field:
    canvas = np.zeros((_SIDE, _SIDE), np.uint8)
    for outline in outlines:
        pixels = np.round(pose.project(_smooth(outline, closed=True)) * 16).astype(np.int32)
        cv2.fillPoly(canvas, [pixels], 255, cv2.LINE_AA, shift=4)
    return _blur(canvas, blur_px)


def _stroke(pose: _Pose, lines: Points, width: float, *, edge: float = 0) -> Field:
    """Draw curves (lines, P, 2), `width` in image heights; `edge` > 0 brightens bone's rims."""
    canvas = np.zeros((_SIDE, _SIDE), np.uint8)
    pixels = list(np.round(pose.project(lines) * 16).astype(np.int32))
    scale = float(np.linalg.norm(pose.matrix[:, 0]))
    for share, grey in ((1.0, 255), (0.6, round(255 * (1 - edge)))):
        if share == 1.0 or edge:
            thickness = max(1, round(width * share * scale))
            cv2.polylines(canvas, pixels, False, grey, thickness, cv2.LINE_AA, shift=4)
    return _blur(canvas, 1.1)


def _clouds(rng: np.random.Generator, cells: int, fade: float = 0.6) -> Field:
    """Draw smooth noise of mean 0 and deviation about 1, `cells` coarse cells to a side."""
    field = rng.standard_normal((cells, cells), dtype=np.float32)
    weight, variance = 1.0, 1.0
    while cells < 128:
        cells, weight = cells * 2, weight * fade
        field = cv2.resize(field, (cells, cells), interpolation=cv2.INTER_CUBIC)
        field = field + weight * rng.standard_normal((cells, cells), dtype=np.float32)
        variance += weight**2
    field = cv2.resize(field, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field / np.sqrt(variance), np.float32)


def _ellipse(x: float, y: float, a: float, b: float, tilt: float = 0) -> Points:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    u, v = a * np.cos(angle), b * np.sin(angle)
    cos, sin = np.cos(tilt), np.sin(tilt)
    return np.stack([x + u * cos - v * sin, y + u * sin + v * cos], 1)


def _lung(anatomy: Anatomy, pose: _Pose, side: int) -> Points:
    """Outline one lung; `side` is -1 for the patient's right, which is the image's left."""
    dome = anatomy.right_dome if side < 0 else anatomy.left_dome
    outline = [
        (0.165, 0.13), (0.265, 0.185), (0.335, 0.3), (0.38, 0.46), (0.405, 0.64), (0.415, 0.78),
        (0.41, 0.84 + dome / 2), (0.35, 0.79 + dome), (0.26, 0.755 + dome), (0.17, 0.755 + dome),
        (0.09, 0.79 + dome), (0.05, 0.72), (0.05, 0.55), (0.05, 0.4), (0.055, 0.28), (0.08, 0.175),
    ]  # fmt: skip
    points = np.array(outline) * (side * anatomy.width, 1)
    points[:, 1] = 0.13 + (points[:, 1] - 0.13) * anatomy.height * pose.breath
    return points


def _draw_ribs(anatomy: Anatomy, pose: _Pose) -> Field:
    """Draw the posterior ribs, falling outwards, and the fainter anterior ones, falling inwards."""
    t = np.linspace(0, 1, 24)
    posterior, anterior = [], []
    for side in (-1, 1):
        for k in range(11):
            y = 0.125 + k * anatomy.rib_pitch
            reach = anatomy.width * min(0.225 + 0.05 * k, 0.425)
            x = side * (0.03 + (reach - 0.03) * np.sin(t * np.pi / 2))
            arch = y - 0.03 * np.sin(np.pi * t) + anatomy.rib_slope * t**2.2
            posterior.append(np.stack([x, arch], 1))
            if k < 7:
                x = side * (reach - (reach - 0.13) * t**1.3)
                fall = y + anatomy.rib_slope + (0.07 + 0.016 * k) * t**0.9
                anterior.append(np.stack([x, fall], 1))
    back = _stroke(pose, np.stack(posterior), 0.022, edge=0.4)
    return back + 0.6 * _stroke(pose, np.stack(anterior), 0.027, edge=0.4)


def _draw_vessels(anatomy: Anatomy, pose: _Pose) -> Field:
    """Draw the vessels as trees that fork outwards from the two hila."""
    rng = np.random.default_rng(anatomy.vessel_seed)
    canvas = np.zeros((_SIDE, _SIDE), np.float32)
    sides = np.repeat([-1.0, 1.0], 8)
    heading = np.radians(np.tile([-75, -50, -25, 5, 30, 50, 66, 80], 2)) + rng.normal(0, 0.15, 16)
    tips = np.array([0.08, 0.42]) + rng.normal(0, 0.016, (16, 2))
    for level in range(5):
        length = rng.uniform(0.04, 0.09, len(heading)) * (1.15 - 0.1 * level)
        path = [tips]
        for _ in range(3):
            heading = heading + rng.normal(0, 0.14, len(heading))
            step = np.stack([np.cos(heading), np.sin(heading)], 1)
            path.append(path[-1] + step * length[:, None] / 3)
        lines = np.stack(path, 1) * np.stack([sides * anatomy.width, sides * sides], 1)[:, None]
        canvas += (0.9, 0.75, 0.6, 0.42, 0.3)[level] * _stroke(pose, lines, 0.011 * 0.62**level)
        fork = rng.uniform(0.2, 0.55, len(heading))
        heading = np.concatenate([heading - fork, heading + fork])
        tips, sides = np.concatenate([path[-1], path[-1]]), np.tile(sides, 2)
    return np.minimum(canvas, 1.0)


@dataclass(frozen=True)
class _Chest:
    """The chest before its signs of disease; every field is (512, 512) in densities of 0 to 1."""

    lungs: tuple[Field, Field]  # masks beside the heart: the patient's right, left
    air: Field  # how much density the air takes away
    solid: Field  # everything else


def _draw_chest(study: PhantomStudy, pose: _Pose, heart_factor: float) -> _Chest:
    a = study.patient.anatomy
    rng = stream(study, POSE, 1)
    right, left = (_fill(pose, _lung(a, pose, side), blur_px=1.6) for side in (-1, 1))
    lung = np.maximum(right, left)
    centre = _draw_centre(a, pose, a.heart * heart_factor * (1.15 if pose.portable else 1.0))
    depth = 0.6 * lung + 0.4 * np.minimum(1.2 * _blur(lung, 26), 1) * lung
    air = 0.41 * depth * (1 - 0.86 * centre)
    # The heart's lower border drowns in the belly, the vessels' upper end in the neck.
    ends = np.array([(0.0, 0.09), (0.0, 0.13 + 0.65 * a.height * pose.breath)])
    row, (top, floor) = np.arange(_SIDE)[:, None], pose.project(ends)[:, 1]
    seen = 1 / (1 + np.exp((row - floor) / 9)) / (1 + np.exp((top - row) / 18))
    solid = _draw_body(rng, a, pose) + 0.19 * centre * seen
    solid *= 1 + 0.05 * _clouds(rng, 5)
    solid += _draw_bones(a, pose, _blur(lung, 8))
    hila = [_ellipse(s * 0.098 * a.width, 0.43, 0.024, 0.055, -s * 0.3) for s in (-1, 1)]
    vessels = 0.075 * _draw_vessels(a, pose) + 0.06 * _fill(pose, *hila, blur_px=5)
    solid += vessels * lung * (1 - 0.7 * centre)
    solid += 0.014 * lung * _clouds(rng, 48, 0.9)
    beside = 1 - 0.8 * centre
    return _Chest((right * beside, left * beside), air.astype(np.float32), solid.astype(np.float32))


def _draw_centre(a: Anatomy, pose: _Pose, heart: float) -> Field:
    """Draw the mediastinum: caval vein and atrium on one side, aorta and ventricle on the other."""
    outline = np.array(
        [(-0.04, -0.2), (-0.06, 0.2), (-0.062, 0.32), (-0.068, 0.44), (-0.098, 0.55),
         (-0.112, 0.64), (-0.1, 0.74), (-0.05, 0.82), (0.1, 0.86), (0.21, 0.815), (0.235, 0.75),
         (0.22, 0.67), (0.175, 0.585), (0.125, 0.5), (0.1, 0.43), (0.08, 0.375), (0.092, 0.325),
         (0.088, 0.28), (0.062, 0.24), (0.05, 0.15), (0.04, -0.2)]
    )  # fmt: skip
    grown = 1 + (heart - 1) * np.clip((outline[:, 1] - 0.4) / 0.2, 0, 1)
    outline[:, 0] *= a.width * grown
    outline[:, 1] = 0.13 + (outline[:, 1] - 0.13) * a.height * pose.breath
    return _fill(pose, outline, blur_px=2.2)


def _draw_bones(a: Anatomy, pose: _Pose, cage: Field) -> Field:
    """Draw ribs, where the blurred lungs `cage` are, clavicles, spine and the windpipe."""
    t = np.linspace(-0.1, 1.1, 36)
    bend = a.spine_bend * np.sin(6 * t)
    spine = _blur(_stroke(pose, np.stack([bend, t], 1)[None], 0.07), 4)
    discs = np.stack([np.stack([bend + s * 0.03, t], 1) for s in (-1, 1)], 1)
    spine = spine * (1 - 0.35 * _blur(_stroke(pose, discs, 0.007), 1.5))
    trachea = _stroke(pose, np.array([[(0.0, -0.1), (-0.004, 0.31)]]), 0.036)
    rise = a.clavicle_slope
    clavicle = np.array(
        [(0.03, 0.2), (0.1, 0.185 - rise / 4), (0.2, 0.15 - rise), (0.33, 0.115 - rise)]
    )
    clavicles = np.stack([_smooth(clavicle * (s, 1), closed=False)[:-8] for s in (-1, 1)])
    bones = 0.075 * np.clip(2.2 * cage, 0, 1) * _draw_ribs(a, pose)
    bones += 0.085 * _stroke(pose, clavicles, 0.026, edge=0.35) + 0.08 * spine
    return np.asarray(bones - 0.07 * _blur(trachea, 2.5), np.float32)


def _draw_body(rng: np.random.Generator, a: Anatomy, pose: _Pose) -> Field:
    """Draw skin, shoulders, arms, belly and breasts, without the lungs."""
    h = a.habitus * a.width
    half = np.array(
        [(0.1, -0.25), (0.1, -0.03), (0.15, 0.035), (0.3, 0.055), (0.44, 0.09), (0.52 * h, 0.2),
         (0.485 * h, 0.4), (0.475 * h, 0.7), (0.49 * h, 0.9), (0.5 * h, 1.4)]
    )  # fmt: skip
    torso = _fill(pose, np.vstack([half, half[::-1] * (-1, 1)]), blur_px=2.0)
    spread = rng.uniform(0.52, 0.62)
    arm = np.array([(0.45, 0.14), (spread * h, 0.4), ((spread + 0.1) * h, 1.0)])
    arms = np.stack([arm * (s, 1) for s in (-1, 1)])
    flesh, bone = _stroke(pose, arms, 0.15), _stroke(pose, arms, 0.04, edge=0.4)
    body = np.maximum(torso, 0.85 * _blur(flesh, 2))
    solid = 0.02 + body * (0.1 + 0.48 * np.clip(1.15 * _blur(body, 36), 0, 1) ** 1.5)
    belly = _fill(pose, _ellipse(0, 1.12, 0.5, 0.36), blur_px=26)
    domes = [_ellipse(s * 0.23, 0.7, 0.14 + 0.03 * a.breast, 0.15) for s in (-1, 1)]
    blades = [_ellipse(s * 0.41 * a.width, 0.27, 0.06, 0.13, -s * 0.25) for s in (-1, 1)]
    solid += 0.06 * bone * body + 0.2 * belly + 0.03 * _fill(pose, *blades, blur_px=2.5)
    solid += 0.075 * a.breast * body * _fill(pose, *domes, blur_px=5)
    if rng.random() < 0.6:  # gas in the stomach
        x, y = rng.uniform(0.1, 0.22), 0.86 + a.left_dome
        gas = _ellipse(x, y, rng.uniform(0.02, 0.06), rng.uniform(0.02, 0.06), 0.2)
        solid -= rng.uniform(0.05, 0.15) * _fill(pose, gas, blur_px=4)
    return np.asarray(solid, np.float32)


# --- disease


def _draw_signs(
    study: PhantomStudy, pose: _Pose, lungs: tuple[Field, Field]
) -> tuple[Field, Field]:
    """Draw what is no pneumonia: the share of air left (512, 512), and densities on top of it.

    Effusions, congestion, atelectasis and nodules, on positives as on abnormal negatives; lines
    and tubes go by the view.
    """
    rng = stream(study, SIGNS)
    chance = {"Normal": 0.0, "Lung Opacity": 0.3}.get(study.finding, 0.36)
    cleared = np.ones((_SIDE, _SIDE), np.float32)
    extra = np.zeros((_SIDE, _SIDE), np.float32)
    if rng.random() < chance:  # effusion: even, with a meniscus that climbs the chest wall
        for side in rng.permutation([-1, 1])[: rng.integers(1, 3)]:
            level = rng.uniform(0.6, 0.8)
            edge = np.array([(0.05, level + 0.04), (0.2, level + 0.035), (0.32, level),
                             (0.41, level - 0.13), (0.5, 1.0), (0.05, 1.0)])  # fmt: skip
            cleared *= 1 - rng.uniform(0.4, 0.9) * _fill(pose, edge * (side, 1), blur_px=7)
    if rng.random() < chance:  # haze: both sides alike, as in congestion
        hila = [_ellipse(s * 0.13, 0.45, 0.11, 0.2, -s * 0.2) for s in (-1, 1)]
        haze = _fill(pose, *hila, blur_px=24) * (0.8 + 0.25 * _clouds(rng, 8))
        cleared *= 1 - rng.uniform(0.08, 0.4) * np.clip(haze, 0, 1)
    if rng.random() < chance:  # plate-like atelectasis, low in the lung
        side, y = rng.choice([-1, 1]), rng.uniform(0.55, 0.75)
        for shift in range(int(rng.integers(1, 4))):
            band = _arc(side * 0.12, y + 0.03 * shift, side * 0.3, y + rng.normal(0, 0.05), 0.01)
            extra += rng.uniform(0.06, 0.16) * _blur(_stroke(pose, band[None], 0.012), 2)
    if rng.random() < chance * 0.7:
        for _ in range(int(rng.integers(1, 4))):
            x, y = rng.choice([-1, 1]) * rng.uniform(0.13, 0.3), rng.uniform(0.25, 0.7)
            r = rng.uniform(0.008, 0.022)
            extra += rng.uniform(0.08, 0.2) * _fill(pose, _ellipse(x, y, r, r), blur_px=2)
    extra *= np.maximum(*lungs)
    if rng.random() < (0.75 if pose.portable else 0.08):
        extra += _draw_lines(rng, pose)
    return cleared, extra


def _arc(x0: float, y0: float, x1: float, y1: float, sag: float) -> Points:
    t = np.linspace(0, 1, 24)
    return np.stack([x0 + (x1 - x0) * t, y0 + (y1 - y0) * t + sag * np.sin(np.pi * t)], 1)


def _draw_lines(rng: np.random.Generator, pose: _Pose) -> Field:
    """Draw what the ward leaves on the patient: leads with electrodes, tubes, a central line."""
    wires, spots, tubes = [], [], []
    for _ in range(int(rng.integers(1, 5))):
        x, y = rng.uniform(-0.38, 0.38), rng.uniform(0.08, 0.7)
        wires.append(_arc(x, y, rng.uniform(-0.6, 0.6), 1.1, rng.normal(0, 0.2)))
        spots.append(_ellipse(x, y, 0.011, 0.011))
    if rng.random() < 0.35:  # endotracheal or gastric tube
        tubes.append(_arc(0.0, -0.1, 0.005, 0.3 if rng.random() < 0.6 else 0.9, 0.0))
    if rng.random() < 0.4:  # central venous catheter down to the right atrium
        tubes.append(_arc(-0.2, 0.05, -0.05, 0.48, -0.05))
    field = 0.1 * _stroke(pose, np.stack(wires), 0.003) + 0.25 * _fill(pose, *spots, blur_px=0.8)
    if tubes:
        field = field + 0.13 * _stroke(pose, np.stack(tubes), 0.006, edge=0.5)
    return np.asarray(field, np.float32)


def _draw_opacities(
    study: PhantomStudy, lungs: tuple[Field, Field]
) -> tuple[Field, tuple[Box, ...]]:
    """Draw the consolidations: the share of air (512, 512) that each leaves, and their boxes.

    The strength is continuous from nearly nothing to a white lung, so that no threshold solves it.
    """
    rng = stream(study, OPACITY)
    cleared = np.ones((_SIDE, _SIDE), np.float32)
    boxes: list[Box] = []
    count = int(rng.choice(4, p=_BOX_COUNT_SHARES)) + 1
    strength = 0.1 + 0.9 * rng.beta(1.4, 1.1)
    first = int(rng.integers(2))
    for i in range(count):
        lung = lungs[(first + i) % 2]
        field, box = _draw_opacity(rng, lung, small=count > 2)
        cleared *= 1 - min(strength * rng.uniform(0.8, 1.2), 0.9) * field
        boxes.append(box)
    return cleared, tuple(boxes)


def _draw_opacity(rng: np.random.Generator, lung: Field, *, small: bool) -> tuple[Field, Box]:
    """Draw one consolidation (512, 512), 0 to 1, in the lung, and the box that hugs it."""
    rows, columns = np.nonzero(lung > 0.5)
    y = rows[int(len(rows) * rng.random() ** 0.7)]  # the rows are sorted: lower zones more often
    row = columns[rows == y]
    x = 0.6 * rng.choice(row) + 0.4 * row.mean()
    shrink = _SIDE * (0.6 if small else 1.0)
    a = shrink * np.clip(rng.lognormal(np.log(0.13), 0.25), 0.05, 0.22)
    b = shrink * np.clip(rng.lognormal(np.log(0.2), 0.42), 0.05, 0.4)
    v, u = np.ogrid[0:_SIDE, 0:_SIDE]
    radius = np.hypot((u - x) / a, (v - y) / b).astype(np.float32)
    field = np.clip((1 - radius + 0.3 * np.maximum(_clouds(rng, 8), -2)) / 0.7, 0, 1)
    field *= lung * np.clip(0.75 + 0.25 * _clouds(rng, 16, 0.8), 0.2, 1.2)
    field = _blur(field, 1.5)
    field /= field.max()
    # The radiologist's hand: the box follows the part that can be seen, a little loosely.
    rows, columns = np.nonzero((field > 0.3) & (radius < 1.35))
    ends = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    ends = ends * (IMAGE_SIDE_PX / _SIDE) + rng.uniform(0, 10, 4) * (-1, -1, 1, 1)
    x0, y0, x1, y1 = (float(end) for end in np.clip(np.round(ends), 0, IMAGE_SIDE_PX))
    return field, Box(x0, y0, x1 - x0, y1 - y0)


# --- the film


def render_study(study: PhantomStudy, *, with_opacity: bool = True) -> Phantom:
    """Render a study; without its opacity everything else stays as it was, to the noise.

    The result depends on `study` alone, to the byte for given versions of numpy and OpenCV.
    """
    pose = _draw_pose(study)
    signs_rng = stream(study, SIGNS, 1)
    large = study.finding != "Normal" and signs_rng.random() < 0.3
    chest = _draw_chest(study, pose, signs_rng.uniform(1.15, 1.45) if large else 1.0)
    cleared, extra = _draw_signs(study, pose, chest.lungs)
    boxes: tuple[Box, ...] = ()
    if study.positive and with_opacity:
        consolidated, boxes = _draw_opacities(study, chest.lungs)
        cleared = cleared * consolidated
    return Phantom(_expose(study, chest.solid - chest.air * cleared + extra), boxes)


def _expose(study: PhantomStudy, density: Field) -> NDArray[np.uint8]:
    """Turn densities into a film: contrast, scatter, noise, marker, black borders."""
    rng = stream(study, FILM)
    portable = study.view == "AP"
    gain = rng.normal(0.95 if portable else 1.0, 0.1)
    gamma = np.exp(rng.normal(0.0, 0.2))
    offset = rng.normal(0.0, 0.03)
    # Without a grid, at the bedside, more scattered rays flatten the picture.
    scatter = rng.uniform(0.0, 0.35 if portable else 0.2)
    density = (1 - scatter) * density + scatter * _blur(density, 60)
    tilt = np.linspace(-1, 1, _SIDE, dtype=np.float32) * rng.normal(0, 0.03)
    film = np.clip(gain * density + offset + tilt, 0, 1.3) ** gamma
    film = 255 * np.tanh(1.2 * film) / np.tanh(1.25)  # the film's shoulder: bone does not clip
    film = cv2.resize(film.astype(np.float32), None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    grain = np.frombuffer(rng.bytes(IMAGE_SIDE_PX**2), np.uint8).reshape(film.shape)
    grain = cv2.GaussianBlur(grain, (3, 3), 0.7).astype(np.float32)
    strength = rng.uniform(0.02, 0.07)
    noisy = cv2.addWeighted(film, 1, grain, strength, -127.5 * strength)
    pixels = np.asarray(cv2.convertScaleAbs(noisy), np.uint8)
    _draw_marker(rng, pixels, portable)
    return pixels


def _draw_marker(rng: np.random.Generator, pixels: NDArray[np.uint8], portable: bool) -> None:
    """Print the side, and on bedside films often the word; blacken collimated borders; in place."""
    right = rng.random() < 0.2
    x, y = int(rng.uniform(20, 110)), int(rng.uniform(70, 220))
    x = x if right else IMAGE_SIDE_PX - 50 - x
    size, grey, thickness = (
        rng.uniform(1.2, 2.2),
        int(rng.uniform(200, 256)),
        int(rng.integers(3, 7)),
    )
    font = cv2.FONT_HERSHEY_DUPLEX
    cv2.putText(pixels, "LR"[right], (x, y), font, size, grey, thickness, cv2.LINE_AA)
    if portable and rng.random() < 0.4:
        x = x if right else x - 60
        cv2.putText(pixels, "PORTABLE", (x, y + 40), font, 0.7, 235, 2, cv2.LINE_AA)
    for edge in range(4):
        if rng.random() < 0.15:
            np.rot90(pixels, edge)[: rng.integers(4, 40)] = rng.integers(0, 12)


# --- the folder
