"""torchvision's networks with one input channel and one logit, and their initial weights."""

import argparse
import io
import pickle
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pneumo import storage
from pneumo.config import WEIGHTS_WITHOUT_FILE, ModelConfig
from pneumo.errors import ConfigError
from pneumo.network.gray_convolution import GrayConv2d
from pneumo.storage.failures import first_line

_DOWNLOAD_TIMEOUT_S = 15.0
_WRAPPERS = (
    "ema",
    *("state_dict", "model_state_dict", "teacher", "student", "model", "net", "encoder"),
)
"""Keys of the weights in the checkpoints of common training programs."""


@dataclass(frozen=True)
class Initialisation:
    """Where the initial weights came from."""

    source: str
    """'imagenet', 'random' or 'file'."""
    message: str
    """One sentence for the user."""
    fell_back: bool = False
    """Whether random weights replace unavailable ones."""


class LayerNames(NamedTuple):
    """Names of a backbone's layers."""

    first_conv: str
    head: str
    """The last linear layer."""
    blocks: str
    """A sequence of blocks; Grad-CAM uses the last one."""


_LAYER_NAMES = {
    "ResNet": LayerNames("conv1", "fc", "layer4"),
    "DenseNet": LayerNames("features.conv0", "classifier", "features"),
    "ConvNeXt": LayerNames("features.0.0", "classifier.2", "features"),
    "EfficientNet": LayerNames("features.0.0", "classifier.1", "features"),
}
"""By the name of torchvision's class."""


def build_model(backbone: str) -> nn.Module:
    """The network with random weights: float images (B, 1, H, W) -> logits (B, 1)."""
    import torchvision  # here, as it imports torch's compiler: 1.6 s of CPU

    model: nn.Module = getattr(torchvision.models, backbone)(weights=None, num_classes=1)
    name = _layer_names(model).first_conv
    old = model.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    sizes: Any = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    first = GrayConv2d(1, old.out_channels, bias=old.bias is not None, **sizes)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, first)
    return model


def initialise(model: nn.Module, config: ModelConfig, *, seed: int) -> Initialisation:
    """Initialise `model` as `config.weights` says.

    Random weights depend on `seed` alone. Where ImageNet weights are neither cached nor reachable
    the weights are random, and the result says so. Raises ConfigError for a file that is missing or
    does not fit.
    """
    _randomise(model, config.backbone, seed)
    if config.weights == "random":
        return Initialisation("random", f"random weights, seed {seed}, as configured")
    if config.weights == "imagenet":
        try:
            state = _download(config.backbone)
        # torch.load's errors for a broken cache, http.client's for a proxy.
        except (OSError, RuntimeError, HTTPException, pickle.UnpicklingError, EOFError) as error:
            reason = first_line(error)
            return Initialisation(
                "random",
                f"ImageNet weights are not available ({reason}): random weights, seed {seed}, "
                "instead; expect a lower AUROC. Set --model.weights random if that is intended",
                fell_back=True,
            )
        load_backbone(model, state, "torchvision's ImageNet weights")
        return Initialisation("imagenet", "ImageNet weights of torchvision, channels summed")
    url = storage.normalise(config.weights)
    try:
        file = io.BytesIO(storage.read_bytes(url))
        # Many training programs, such as DINO's, save their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"model.weights: {config.weights!r} is no file; give 'imagenet', 'random', a run, or "
            "the path of a state dict"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"model.weights: {url} is no PyTorch state dict, or holds more than tensors and plain "
            "values, which could run code; save the weights alone"
        ) from error
    load_backbone(model, _unwrap(state, url), url)
    return Initialisation("file", f"weights of {url}")


def check_weights(config: ModelConfig) -> None:
    """Raises ConfigError for a file that is missing or does not fit, as `initialise` would."""
    if config.weights not in WEIGHTS_WITHOUT_FILE:
        initialise(build_model(config.backbone), config, seed=0)


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict into `model`; a classifier of another shape is not loaded.

    A first convolution of three channels is summed over them, which gives the same activations as a
    gray image repeated three times. The names may have a prefix, as an encoder's have after
    self-supervised training; entries without it are ignored. Raises ConfigError, which names what
    does not fit.
    """
    names, own = _layer_names(model), model.state_dict()
    first_key = f"{names.first_conv}.weight"
    head_root = names.head.split(".")[0] + "."
    prefix = _find_prefix(state, first_key, own)
    fitted = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if prefix:  # there may be a projection head in place of the classifier
        fitted = {k: v for k, v in fitted.items() if k in own or not k.startswith(head_root)}
    first = fitted.get(first_key)
    if first is not None and first.ndim == 4 and first.shape[1] == 3:
        fitted[first_key] = first.sum(dim=1, keepdim=True)
    # Weights saved before PyTorch 0.4.1, as torchvision's ResNet-18, lack num_batches_tracked.
    fitted = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | fitted
    for key in (key for key in own if key.startswith(head_root)):
        in_head = key.startswith(f"{names.head}.")
        if key not in fitted or (in_head and fitted[key].shape != own[key].shape):
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
    """The last convolutional block, whose feature maps the classifier averages."""
    return model.get_submodule(_layer_names(model).blocks)[-1]  # type: ignore[index, no-any-return]


def _layer_names(model: nn.Module) -> LayerNames:
    # Networks of other classes must have ResNet's layer names.
    return _LAYER_NAMES.get(type(model).__name__, _LAYER_NAMES["ResNet"])


def _unwrap(content: object, url: str) -> Mapping[str, Tensor]:
    """The state dict in a file's content: the content itself, or the value of a key of _WRAPPERS.

    Raises ConfigError where there is none.
    """
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        tensors = {k: v for k, v in content.items() if torch.is_tensor(v)}
        if tensors and len(tensors) == len(content):
            return tensors
        inner = (content.get(name) for name in _WRAPPERS)
        content = next((one for one in inner if isinstance(one, Mapping)), None)
    raise ConfigError(
        f"model.weights: {url} is no state dict: names of tensors, at the top or under one of "
        f"{', '.join(_WRAPPERS)}"
    )


def _find_prefix(state: Mapping[str, Tensor], first_key: str, own: Mapping[str, Tensor]) -> str:
    """The prefix of the backbone's names in `state`; '' where none is found.

    Of several encoders the trained one is taken, not its momentum copy (MoCo's encoder_k); then the
    one with the most names of `own`.
    """
    found = [
        k.removesuffix(first_key) for k in state if k == first_key or k.endswith(f".{first_key}")
    ]

    def rank(prefix: str) -> tuple[bool, int, int]:
        known = sum(f"{prefix}{key}" in state for key in own)
        return "encoder_k" in prefix or "momentum" in prefix, -known, len(prefix)

    return min(found, key=rank, default="")


def _randomise(model: nn.Module, backbone: str, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if type(model).__name__ in _LAYER_NAMES.keys() - {"ResNet"}:
            # Each class has its own initialisation, in torchvision's constructor.
            model.load_state_dict(build_model(backbone).state_dict())
            return
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()


def _download(backbone: str) -> Mapping[str, Tensor]:
    """torchvision's ImageNet weights, from its cache or the internet, with a time limit."""
    import torchvision  # see build_model

    weights = torchvision.models.get_model_weights(backbone).DEFAULT
    old_timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    finally:
        socket.setdefaulttimeout(old_timeout_s)
    return state
