"""Where the model looks: Grad-CAM, its score against the radiologists' boxes, and whom to show.

A map says what moved the logit, not what is ill: it is an aid to find shortcuts, no diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
from torch import Tensor, nn

from pneumo.errors import MetricError
from pneumo.model import gradcam_layer, has_averaged_features, linear_head
from pneumo.studies import Box

Outcome = Literal["tp", "fp", "fn", "tn"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Maps = npt.NDArray[np.float32]

_EPSILON = 1e-7
"""Of pytorch-grad-cam: keeps a map without any positive evidence at 0 instead of dividing by 0."""


def gradcam(model: nn.Module, images: Tensor) -> Maps:
    """Grad-CAM of the positive class at the last convolutional block (Selvaraju 2017).

    `images` float32 (B, 1, H, W), normalised as in training, on the model's device. Returns
    float32 (B, H, W) in [0, 1], each map stretched to its own maximum: two maps' values cannot be
    compared, and a map is 0 everywhere where nothing speaks for pneumonia. Computed in float32 and
    in eval mode; the model is left as it was. `model` must not be compiled.
    """
    layers = [gradcam_layer(model)]
    with _undisturbed(model), torch.enable_grad(), GradCAM(model, layers) as cam:
        maps = cam(
            input_tensor=images.detach().clone().float().requires_grad_(),
            targets=[BinaryClassifierOutputTarget(1)] * len(images),
        )
        return np.asarray(maps, dtype=np.float32)
    # The library's `with` swallows an IndexError and goes on without a result.
    raise MetricError("Grad-CAM gave no map; has the model one logit per image?")


@torch.no_grad()
def class_activation(model: nn.Module, images: Tensor) -> Maps:
    """The same maps as `gradcam`, for the price of a forward pass (Zhou 2016).

    Right for networks whose last layers are global average pooling and one linear layer: there
    Grad-CAM's weights are the linear layer's. Others get `gradcam` itself.
    """
    if not has_averaged_features(model):
        return gradcam(model, images)
    features: list[Tensor] = []
    hook = gradcam_layer(model).register_forward_hook(
        lambda module, inputs, output: features.append(output)
    )
    try:
        with _undisturbed(model):
            model(images.float())
            weight = linear_head(model).weight[0]
            evidence = torch.einsum("bchw,c->bhw", features[0], weight).clamp(min=0)
    finally:
        hook.remove()
    size = (images.shape[-2], images.shape[-1])
    large = F.interpolate(_stretch(evidence)[:, None], size=size, mode="bilinear")[:, 0]
    return np.asarray(_stretch(large).cpu().numpy(), dtype=np.float32)


def _stretch(maps: Tensor) -> Tensor:
    """Each map from its minimum to its maximum, as [0, 1]."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    high = (maps - low).amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high + _EPSILON)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, float32, and no gradient left in a parameter."""
    was_training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device_type = next(model.parameters()).device.type
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        model.train(was_training)
        for parameter in trainable:
            parameter.requires_grad_()


@dataclass(frozen=True)
class BoxScore:
    """How a map and the boxes of one study agree."""

    is_hit: bool
    """Pointing game: the map's maximum lies in a box (Zhang 2018)."""
    energy: float
    """Share of the map's sum that lies in the boxes, 0 to 1; NaN of a map that is 0 everywhere."""
    area: float
    """Share of the image that the boxes cover: the energy of a map without knowledge."""

    @property
    def lift(self) -> float:
        """energy / area: 1 is chance."""
        return self.energy / self.area


def score_against_boxes(cam: npt.NDArray[Any], boxes: Sequence[Box]) -> BoxScore:
    """Score one map (H, W) against boxes in its pixels.

    Raises MetricError where the boxes cover none of them.
    """
    mask = box_mask(cam.shape, boxes)
    if not mask.any():
        raise MetricError(f"no box lies on the map of shape {cam.shape}")
    total = float(cam.sum())
    peak = np.unravel_index(int(np.argmax(cam)), cam.shape)
    return BoxScore(
        is_hit=total > 0 and bool(mask[peak]),
        energy=float(cam[mask].sum()) / total if total > 0 else float("nan"),
        area=float(mask.mean()),
    )


def box_mask(shape: Sequence[int], boxes: Sequence[Box]) -> npt.NDArray[np.bool_]:
    """True where a pixel's centre lies in a box; (H, W)."""
    height, width = shape
    row, column = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
    mask = np.zeros((height, width), dtype=np.bool_)
    for x, y, box_width, box_height in boxes:
        in_rows = (row >= y) & (row < y + box_height)
        mask |= in_rows & (column >= x) & (column < x + box_width)
    return mask


def choose_gallery(
    target: npt.NDArray[Any],
    probability: npt.NDArray[Any],
    threshold: float,
    *,
    per_outcome: int,
    seed: int,
) -> dict[Outcome, npt.NDArray[np.intp]]:
    """Which studies to show: indices by outcome, at most `per_outcome` each.

    The first half are the most certain ones, most certain first; the rest are drawn by `seed` from
    the others, so that the picture is not of the extremes alone. All inputs (N,).
    """
    called = np.asarray(probability) >= threshold
    positive = np.asarray(target) == 1
    groups = {
        "tp": positive & called,
        "fp": ~positive & called,
        "fn": positive & ~called,
        "tn": ~positive & ~called,
    }
    num_certain = (per_outcome + 1) // 2
    chosen: dict[Outcome, npt.NDArray[np.intp]] = {}
    for number, outcome in enumerate(OUTCOMES):
        rows = np.flatnonzero(groups[outcome])
        certainty = probability[rows] if outcome in ("tp", "fp") else -probability[rows]
        ordered = rows[np.argsort(-certainty, kind="stable")]
        certain, rest = ordered[:num_certain], ordered[num_certain:]
        # A generator per outcome: one outcome's number does not change another's draw.
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(rest)[: per_outcome - len(certain)]
        chosen[outcome] = np.concatenate([certain, drawn])
    return chosen
