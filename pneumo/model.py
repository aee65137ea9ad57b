"""A torchvision ResNet with one input channel and one logit, and what its weights start from."""

from __future__ import annotations

import io
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException

import torch
import torchvision
from torch import Tensor, nn

from pneumo import storage
from pneumo.config import ModelConfig
from pneumo.errors import ConfigError

_DOWNLOAD_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Initialisation:
    """Where the weights came from: for the person at the terminal, the checkpoint and the
    report."""

    source: str
    """'imagenet', 'random' or 'file'."""
    message: str
    """One sentence."""
    fell_back: bool = False
    """Whether something else had been asked for."""


def build_model(backbone: str) -> nn.Module:
    """The network with random weights: float images (B, 1, H, W) -> logits (B, 1)."""
    model: nn.Module = getattr(torchvision.models, backbone)(weights=None, num_classes=1)
    old = model.get_submodule("conv1")
    assert isinstance(old, nn.Conv2d)
    model.conv1 = nn.Conv2d(1, old.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def initialise(model: nn.Module, config: ModelConfig, *, seed: int) -> Initialisation:
    """Fill `model` as `config.weights` asks; never silently with something else.

    Random weights depend on the seed. Weights that cannot be had (no cache, no network) leave the
    random ones, and the result says so. Raises ConfigError for a file that does not fit.
    """
    _randomise(model, seed)
    if config.weights == "random":
        return Initialisation("random", f"random weights, seed {seed}, as asked for")
    if config.weights == "imagenet":
        try:
            state = _download(config.backbone)
        # A cache that holds something else fails as torch.load does; a proxy as http.client does.
        except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError, EOFError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return Initialisation(
                "random",
                f"ImageNet weights cannot be had ({reason}): random weights, seed {seed}, instead; "
                "expect a lower AUROC. --model.weights random says that it is meant",
                fell_back=True,
            )
        load_backbone(model, state, "torchvision's ImageNet weights")
        return Initialisation("imagenet", "ImageNet weights of torchvision, channels summed")
    url = storage.normalise(config.weights)
    try:
        state = torch.load(
            io.BytesIO(storage.read_bytes(url)), map_location="cpu", weights_only=True
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"model.weights: {config.weights!r} is no file; give 'imagenet', 'random' or the "
            "path of a state dict"
        ) from error
    except Exception as error:
        raise ConfigError(f"model.weights: {url} is no PyTorch state dict") from error
    if not isinstance(state, Mapping) or not all(torch.is_tensor(v) for v in state.values()):
        raise ConfigError(f"model.weights: {url} is no state dict: names of tensors, nothing else")
    load_backbone(model, state, url)
    return Initialisation("file", f"weights of {url}")


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict into `model`, its classifier left as it is unless it has one output.

    A first convolution of three channels is summed over them: a gray image repeated three times
    gives the same activations. Raises ConfigError naming what does not fit.
    """
    fitted = dict(state)
    first = fitted.get("conv1.weight")
    if first is not None and first.ndim == 4 and first.shape[1] == 3:
        fitted["conv1.weight"] = first.sum(dim=1, keepdim=True)
    own = model.state_dict()
    # Weights from before PyTorch 0.4.1, such as torchvision's of ResNet-18, count no batches.
    fitted = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | fitted
    for key in ("fc.weight", "fc.bias"):
        if key not in fitted or fitted[key].shape != own[key].shape:
            fitted[key] = own[key]
    wrong = [
        f"{key} {tuple(fitted[key].shape)} for {tuple(own[key].shape)}"
        if key in fitted
        else f"{key} missing"
        for key in own
        if key not in fitted or fitted[key].shape != own[key].shape
    ]
    unknown = [key for key in fitted if key not in own]
    if wrong or unknown:
        raise ConfigError(
            f"model.weights: {name} does not fit: {'; '.join([*wrong, *unknown][:3])}"
            f" ({len(wrong)} wrong or missing, {len(unknown)} unknown)"
        )
    model.load_state_dict(fitted)


def gradcam_layer(model: nn.Module) -> nn.Module:
    """The last convolutional block, whose maps the classifier averages."""
    return model.get_submodule("layer4")[-1]  # type: ignore[index, no-any-return]


def _randomise(model: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()


def _download(backbone: str) -> Mapping[str, Tensor]:
    """torchvision's ImageNet weights, from its cache or the network, not waiting for ever."""
    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    finally:
        socket.setdefaulttimeout(before)
    return state
