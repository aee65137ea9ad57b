"""Grad-CAM is the paper's formula, whatever the network ends in, and leaves the model alone."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet

from pneumo.config import ModelConfig
from pneumo.errors import MetricError
from pneumo.network.backbones import build_model, gradcam_layer
from pneumo.network.gradcam import Maps, build_random_network, gradcam

BACKBONES = get_args(ModelConfig.model_fields["backbone"].annotation)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = build_model("resnet18")
    network(torch.randn(8, 1, 64, 64))  # running statistics that are not the defaults
    return network


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 1, 96, 128, generator=torch.Generator().manual_seed(1))


def by_formula(model: nn.Module, images: Tensor) -> Maps:
    """Equations 1 and 2 of the paper by plain autograd through the whole network."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()  # what follows may write into it

    hook = gradcam_layer(model).register_forward_hook(keep)
    model.eval()(images.clone().requires_grad_()).sum().backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    [features] = kept
    gradient, values = features.grad, features.detach()
    assert gradient is not None
    if isinstance(model, DenseNet):  # its last ReLU writes into the block's output
        values = values.relu()
    evidence = (gradient.mean((2, 3), keepdim=True) * values).sum(1).clamp(min=0)

    def stretch(maps: Tensor) -> Tensor:
        maps = maps - maps.amin((1, 2), keepdim=True)
        return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)

    large = F.interpolate(stretch(evidence)[:, None], images.shape[-2:], mode="bilinear")[:, 0]
    return np.asarray(stretch(large).numpy(), dtype=np.float32)


class NormedHead(nn.Module):
    """As ConvNeXt ends: a norm and an activation in place between the last block and the logit."""

    def __init__(self) -> None:
        super().__init__()
        self.layer4 = nn.Sequential(nn.Conv2d(1, 6, 5, stride=4))
        self.head = nn.Sequential(
            nn.Hardswish(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(6),
            nn.Linear(6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.layer4(x)))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_are_those_of_the_formula_for_each_backbone(backbone: str, images: Tensor) -> None:
    network = build_random_network(backbone, seed=0)
    few = images[:2, :, :64, :64]
    found = gradcam(network, few)
    assert found.max() > 0
    assert np.abs(found - by_formula(network, few)).max() < 1e-4


def test_maps_are_in_their_range_and_of_the_images_size(model: nn.Module, images: Tensor) -> None:
    maps = gradcam(model, images)
    assert maps.shape == (5, 96, 128)
    assert maps.dtype == np.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps.max(axis=(1, 2)) == pytest.approx(1, abs=1e-4)


def test_a_head_that_writes_into_its_input_is_differentiated(images: Tensor) -> None:
    torch.manual_seed(3)
    assert gradcam(NormedHead().eval(), images).max() > 0


def test_maps_leave_the_model_as_it_was_and_ignore_what_surrounds_them(
    model: nn.Module, images: Tensor
) -> None:
    expected = gradcam(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradcam(model, images)

    assert model.training
    assert np.array_equal(found, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_map_without_evidence_is_zero(model: nn.Module, images: Tensor) -> None:
    head = model.get_submodule("fc")
    assert isinstance(head, nn.Linear)
    weight = head.weight.detach().clone()
    with torch.no_grad():
        head.weight.copy_(-weight.abs())
    try:
        assert gradcam(model, images).max() == 0
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)


def test_maps_do_not_depend_on_their_neighbours(model: nn.Module, images: Tensor) -> None:
    alone = np.concatenate([gradcam(model, image[None]) for image in images])
    assert np.abs(gradcam(model, images) - alone).max() < 1e-4


def test_no_result_is_an_error(images: Tensor) -> None:
    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer4 = nn.Sequential(nn.Conv2d(1, 2, 3))

        def forward(self, x: Tensor) -> Tensor:
            raise IndexError("no logit")

    with pytest.raises(MetricError, match="no map"):
        gradcam(Headless(), images)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_network_has_maps_that_say_something_and_are_the_seeds(
    images: Tensor, seed: int
) -> None:
    found, again, other = (
        gradcam(build_random_network("resnet18", seed=s), images) for s in (seed, seed, seed + 1)
    )
    assert (found.max(axis=(1, 2)) > 0).mean() > 0.5
    assert np.array_equal(found, again)
    assert np.abs(found - other).max() > 0.1
