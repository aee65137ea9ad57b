"""Grad-CAM: which places of an image raised the network's logit (Selvaraju 2017, arXiv:1610.02391).

A map says what moved the logit, not what is ill: it is an aid to find shortcuts, no diagnosis.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pneumo.config import ModelConfig
from pneumo.errors import MetricError
from pneumo.network.backbones import build_model, gradcam_layer, initialise

Maps = npt.NDArray[np.float32]

_RANDOM_ATTEMPTS = 16


def gradcam(model: nn.Module, images: Tensor) -> Maps:
    """Grad-CAM of the positive class at the last convolutional block.

    `images` float32 (B, 1, H, W), normalised as in training, on the model's device. Returns
    float32 (B, H, W) in [0, 1], each map stretched to its own maximum: two maps' values cannot be
    compared, and a map is 0 everywhere where nothing speaks for pneumonia. Computed in float32 and
    in eval mode; the model is left as it was. `model` must not be compiled. Raises MetricError for
    a network that does not give one logit an image.

    It costs little more than a forward pass, a third of what pytorch-grad-cam's own example takes:
    only what stands behind the block is differentiated.
    """
    # 1.6 s of CPU, as it imports Matplotlib and scikit-learn: only where maps are made.
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget

    layer = gradcam_layer(model)
    with (
        _undisturbed(model),
        _graph_from(layer),
        torch.enable_grad(),
        GradCAM(model, [layer]) as cam,
    ):
        maps = cam(
            input_tensor=images.detach().float(),
            targets=[BinaryClassifierOutputTarget(1)] * len(images),
        )
        return np.asarray(maps, dtype=np.float32)
    # The library's `with` swallows an IndexError and goes on without a result.
    raise MetricError("Grad-CAM gave no map; has the model one logit per image?")


def build_random_network(backbone: str, *, seed: int) -> nn.Module:
    """The same architecture with random weights, in evaluation mode: its maps' scores show what
    architecture and data give without learning (Adebayo 2018, sanity checks for saliency maps).

    A random classifier may find nothing positive anywhere, and its maps are empty; the first of
    the networks that `seed` draws is taken whose maps of noise mostly are not.
    """
    noise = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    network = build_model(backbone)
    config = ModelConfig.model_validate({"backbone": backbone, "weights": "random"})
    for attempt in range(_RANDOM_ATTEMPTS):
        initialise(network, config, seed=seed * _RANDOM_ATTEMPTS + attempt)
        if (gradcam(network, noise).max(axis=(1, 2)) > 0).mean() > 0.5:
            break
    return network.eval()


@contextmanager
def _graph_from(layer: nn.Module) -> Iterator[None]:
    """Inside, autograd's graph begins at the layer's output."""

    def begin_here(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # A clone, because what follows may write into its input, as DenseNet's last ReLU does;
        # never into a leaf.
        return output.detach().requires_grad_().clone()

    hook = layer.register_forward_hook(begin_here)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode and float32; afterwards no parameter holds a gradient."""
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
