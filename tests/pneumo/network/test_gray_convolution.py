"""The first convolution's other way is the plain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pneumo.config import ModelConfig
from pneumo.network.backbones import build_model
from pneumo.network.gray_convolution import GrayConv2d, convolve_unshuffled

pytestmark = pytest.mark.processors

# Of ResNet and DenseNet, EfficientNet, ConvNeXt; then others.
KERNELS = [(7, 2, 3), (3, 2, 1), (4, 4, 0), (5, 2, 2), (2, 2, 0), (8, 4, 2), (1, 1, 0), (5, 3, 1)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("size", "stride", "padding"), KERNELS)
def test_it_is_the_convolution_and_has_its_gradient(
    size: int, stride: int, padding: int, has_bias: bool
) -> None:
    rng = torch.Generator().manual_seed(size * 100 + stride)
    images = torch.randn(2, 1, 8 * stride, 5 * stride, generator=rng, dtype=torch.float64)
    weight = torch.randn(6, 1, size, size, generator=rng, dtype=torch.float64)
    bias = torch.randn(6, generator=rng, dtype=torch.float64) if has_bias else None
    inputs = [t.requires_grad_() for t in (images, weight, bias) if t is not None]
    expected = F.conv2d(images, weight, bias, stride=stride, padding=padding)
    found = convolve_unshuffled(images, weight, bias, stride=stride, padding=padding)
    torch.testing.assert_close(found, expected)
    pull = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, pull), torch.autograd.grad(expected, inputs, pull)
    )


@pytest.mark.parametrize(("size", "stride", "padding"), [(7, 2, 2), (3, 2, 2), (5, 1, 1)])
def test_what_gives_another_size_is_refused(size: int, stride: int, padding: int) -> None:
    with pytest.raises(ValueError, match="another size"):
        convolve_unshuffled(
            torch.zeros(1, 1, 12, 12),
            torch.zeros(1, 1, size, size),
            None,
            stride=stride,
            padding=padding,
        )


@pytest.mark.parametrize("backbone", ModelConfig.model_fields["backbone"].annotation.__args__)  # type: ignore[union-attr]
def test_every_backbone_begins_with_one_that_fits(backbone: str) -> None:
    [stem] = [
        module for module in build_model(backbone).modules() if isinstance(module, GrayConv2d)
    ]
    images = torch.randn(1, 1, 64, 96)
    plain = nn.Conv2d.forward(stem, images)
    assert torch.equal(stem(images), plain)  # on a CPU nothing is different
    stride, padding = stem.stride[0], int(stem.padding[0])
    found = convolve_unshuffled(images, stem.weight, stem.bias, stride=stride, padding=padding)
    torch.testing.assert_close(found, plain)
