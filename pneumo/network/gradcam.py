"""Grad-CAM: where the network saw evidence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget
from torch import Tensor, nn

from pneumo.config import ModelConfig
from pneumo.errors import MetricError
from pneumo.network.backbones import build_model, gradcam_layer, initialise

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
