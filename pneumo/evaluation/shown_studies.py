"""Where the model looks: Grad-CAM, whom to show it of, and which studies the model gets wrong.

A map says what moved the logit, not what is ill: it is an aid to find shortcuts, no diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from pneumo.config import ModelConfig
from pneumo.errors import MetricError
from pneumo.evaluation.bootstrap import (
    WILSON,
    Estimate,
    as_json,
    divide,
    resample,
    sums_statistic,
    wilson,
    with_wilson,
)
from pneumo.network.backbones import build_model, gradcam_layer, initialise

Outcome = Literal["tp", "fp", "fn", "tn"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ERRORS: tuple[Outcome, ...] = ("fp", "fn")
Maps = npt.NDArray[np.float32]

_EPSILON = 1e-7
"""Of pytorch-grad-cam: keeps a map without any positive evidence at 0 instead of dividing by 0."""
_RANDOM_ATTEMPTS = 16


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


def class_activation(model: nn.Module, images: Tensor) -> Maps:
    """The same maps as `gradcam`, for the price of a forward pass, whatever the network ends in.

    Grad-CAM's weights are gradients at the last convolutional block, so only what stands behind it
    has to be differentiated. Of a network that ends in global average pooling and one linear layer
    they are that layer's weights (Zhou 2016); of another they are still right.
    """
    cut: list[tuple[Tensor, Tensor]] = []

    def begin_here(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        # What follows may write into its input, as DenseNet's last ReLU does; never into a leaf.
        cut.append((leaf, leaf.clone()))
        return cut[-1][1]

    hook = gradcam_layer(model).register_forward_hook(begin_here)
    try:
        with _undisturbed(model), torch.enable_grad():
            logits = model(images.detach().float())
            leaf, features = cut[-1]
            (gradient,) = torch.autograd.grad(logits.sum(), leaf)
            return _weigh(features.detach(), gradient, (images.shape[-2], images.shape[-1]))
    finally:
        hook.remove()


def _weigh(features: Tensor, gradient: Tensor, size: tuple[int, int]) -> Maps:
    """Grad-CAM's maps at `size` from a block's output and the logits' gradient at it, both
    (B, C, h, w)."""
    weights = gradient.mean(dim=(2, 3))
    evidence = torch.einsum("bchw,bc->bhw", features, weights).clamp(min=0)
    large = F.interpolate(_stretch(evidence)[:, None], size=size, mode="bilinear")[:, 0]
    return np.asarray(_stretch(large).cpu().numpy(), dtype=np.float32)


def randomised(backbone: str, *, seed: int) -> nn.Module:
    """The same architecture with random weights, in evaluation mode: what its maps score, the
    architecture and the data alone can score (Adebayo 2018, sanity checks for saliency maps).

    A random classifier may find nothing positive anywhere, and its maps are empty; the first of
    the networks that `seed` draws is taken whose maps of noise mostly are not.
    """
    noise = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    network = build_model(backbone)
    config = ModelConfig.model_validate({"backbone": backbone, "weights": "random"})
    for attempt in range(_RANDOM_ATTEMPTS):
        initialise(network, config, seed=seed * _RANDOM_ATTEMPTS + attempt)
        if (class_activation(network, noise).max(axis=(1, 2)) > 0).mean() > 0.5:
            break
    return network.eval()


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


Why = Literal["most certain", "least certain", "drawn"]


@dataclass(frozen=True)
class GalleryChoice:
    """A study to show, and why this one."""

    row: int
    """Its place in the arrays it was chosen from."""
    why: Why


def choose_gallery(
    target: npt.NDArray[Any],
    probability: npt.NDArray[Any],
    threshold: float,
    *,
    per_outcome: int,
    seed: int,
) -> dict[Outcome, list[GalleryChoice]]:
    """Which studies to show, at most `per_outcome` of each outcome.

    A third are those that the model is most certain of, most certain first; a third those whose
    probability is nearest to the threshold, nearest first; the rest are drawn by `seed` from all
    others, so that the gallery is not of the extremes alone. All inputs (N,).
    """
    chosen: dict[Outcome, list[GalleryChoice]] = {}
    for number, outcome in enumerate(OUTCOMES):
        rows = _by_certainty(target, probability, threshold, outcome)
        num_most = min(-(-per_outcome // 3), len(rows))
        num_least = min(-(-(per_outcome - num_most) // 2), len(rows) - num_most)
        between = rows[num_most : len(rows) - num_least]
        # A generator per outcome: one outcome's number does not change another's draw.
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(between)[: per_outcome - num_most - num_least]
        parts: tuple[tuple[Why, npt.NDArray[np.intp]], ...] = (
            ("most certain", rows[:num_most]),
            ("least certain", rows[len(rows) - num_least :][::-1]),
            ("drawn", drawn),
        )
        chosen[outcome] = [GalleryChoice(int(row), why) for why, part in parts for row in part]
    return chosen


@dataclass(frozen=True)
class SampledStudy:
    """A study of a stratified sample."""

    row: int
    """Its place in the arrays it was drawn from."""
    drawn_of: int
    """Studies of its outcome and view."""


def draw_sample(
    target: npt.NDArray[Any],
    probability: npt.NDArray[Any],
    view: npt.NDArray[np.str_],
    threshold: float,
    *,
    per_stratum: int,
    seed: int,
) -> list[SampledStudy]:
    """At most `per_stratum` studies of each outcome and view, by outcome, then by view; drawn by
    `seed`. All inputs (N,)."""
    sample = []
    for i, outcome in enumerate(OUTCOMES):
        rows = np.sort(_by_certainty(target, probability, threshold, outcome))
        for k, name in enumerate(np.unique(view)):
            stratum = rows[view[rows] == name]
            # A generator per stratum: one's number does not change another's draw.
            drawn = np.random.default_rng([seed, i, k]).permutation(stratum)[:per_stratum]
            sample += [SampledStudy(int(row), len(stratum)) for row in drawn]
    return sample


def choose_errors(
    target: npt.NDArray[Any], probability: npt.NDArray[Any], threshold: float, *, count: int
) -> dict[Outcome, npt.NDArray[np.intp]]:
    """The false positives and the false negatives that the model is most certain of.

    Indices, at most `count` each, most certain first. All inputs (N,).
    """
    return {
        outcome: _by_certainty(target, probability, threshold, outcome)[:count]
        for outcome in ERRORS
    }


def _by_certainty(
    target: npt.NDArray[Any], probability: npt.NDArray[Any], threshold: float, outcome: Outcome
) -> npt.NDArray[np.intp]:
    """The rows of an outcome, farthest from the threshold first; ties in the order given."""
    is_called, is_positive = outcome in ("tp", "fp"), outcome in ("tp", "fn")
    called, positive = np.asarray(probability) >= threshold, np.asarray(target) == 1
    rows = np.flatnonzero((called == is_called) & (positive == is_positive))
    certainty = probability[rows] if is_called else -probability[rows]
    return rows[np.argsort(-certainty, kind="stable")]


@dataclass(frozen=True)
class FindingErrors:
    """How the studies of one finding were called."""

    finding: str
    n: int
    called_positive: int
    errors: int
    """False negatives where the finding is a positive one, false positives elsewhere."""
    error_rate: Estimate
    """The fraction of errors, with an interval over patients."""
    wilson: Estimate
    """The same with Wilson's, which takes images as independent."""

    def to_json(self) -> dict[str, Any]:
        """All but the name of the finding."""
        return dict(as_json(self, leave_out={"finding"}))


def count_errors(
    finding: npt.NDArray[np.str_],
    target: npt.NDArray[Any],
    probability: npt.NDArray[Any],
    threshold: float,
    *,
    patient: npt.NDArray[np.str_],
    resamples: int,
    seed: int,
) -> list[FindingErrors]:
    """The errors by finding, in the findings' alphabetical order. All arrays (N,)."""
    called = np.asarray(probability) >= threshold
    wrong = called != (np.asarray(target) == 1)
    names, code = np.unique(finding, return_inverse=True)
    sums = sums_statistic(code, len(names), wrong, np.ones(len(code)))
    found = resample(patient, {"sums": sums}, resamples=resamples, seed=seed)["sums"]
    rates = found.derive(lambda both: divide(both[: len(names)], both[len(names) :]))
    return [
        _estimate_errors(str(name), called[here], wrong[here], patient[here], rates.estimate(row))
        for row, name in enumerate(names)
        for here in (code == row,)
    ]


def _estimate_errors(
    finding: str,
    called: npt.NDArray[np.bool_],
    wrong: npt.NDArray[np.bool_],
    patient: npt.NDArray[np.str_],
    rate: Estimate,
) -> FindingErrors:
    n, errors = len(wrong), int(wrong.sum())
    fraction = errors / n
    rate = with_wilson(rate, len(np.unique(patient)))
    by_image = Estimate(fraction, *wilson(fraction, n), WILSON)
    return FindingErrors(finding, n, int(called.sum()), errors, rate, by_image)
