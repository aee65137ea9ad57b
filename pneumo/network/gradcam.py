"""Grad-CAM: which regions of an image raised the logit (Selvaraju 2017, arXiv:1610.02391).

A map shows what raised the logit, not what is ill: it helps to find shortcuts, and is no diagnosis.
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
    float32 (B, H, W) in [0, 1], each map divided by its own maximum: values of two maps cannot be
    compared. A map without positive evidence is 0 everywhere. Computed in float32 and in eval mode;
    the model is left unchanged. `model` must not be compiled. Raises MetricError for a network
    without one logit per image.

    It costs little more than a forward pass, a third of pytorch-grad-cam's own example: only the
    layers after the block are differentiated.
    """
    # Imported here, as it imports Matplotlib and scikit-learn: 1.6 s of CPU.
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import BinaryClassifierOutputTarget

    layer = gradcam_layer(model)
    with (
        _frozen_in_eval_mode(model),
        _graph_from(layer),
        torch.enable_grad(),
        GradCAM(model, [layer]) as cam,
    ):
        maps = cam(
            input_tensor=images.detach().float(),
            targets=[BinaryClassifierOutputTarget(1)] * len(images),
        )
        return np.asarray(maps, dtype=np.float32)
    # Reached where the library's context manager has suppressed an IndexError.
    raise MetricError("Grad-CAM gave no map; has the model one logit per image?")


def build_random_network(backbone: str, *, seed: int) -> nn.Module:
    """The architecture with random weights, in evaluation mode: the baseline of maps without any
    training (Adebayo 2018, sanity checks for saliency maps).

    The maps of a random classifier may all be empty. Of the networks that follow from `seed` the
    first is taken whose maps of noise are mostly not.
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
    """Autograd's graph starts at the layer's output, inside the context."""

    def start_graph(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # A clone: the next layer may write in place, as DenseNet's last ReLU does, which autograd
        # forbids for a leaf.
        return output.detach().requires_grad_().clone()

    hook = layer.register_forward_hook(start_graph)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, float32 and no gradients of parameters, inside the context."""
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
