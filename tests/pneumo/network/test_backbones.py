"""One channel in, one logit out; weights are what was asked for, or the message says otherwise."""

import argparse
import http.server
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torchvision
from torch import nn

from pneumo.config import ModelConfig
from pneumo.errors import ConfigError, UserError
from pneumo.network.backbones import (
    Initialisation,
    build_model,
    gradcam_layer,
    initialise,
    load_backbone,
)

BACKBONES: tuple[str, ...] = get_args(ModelConfig.model_fields["backbone"].annotation)
FIRST_CONV = {"densenet121": "features.conv0"} | dict.fromkeys(
    ("convnext_tiny", "efficientnet_v2_s"), "features.0.0"
)
HEAD = {
    "densenet121": "classifier",
    "convnext_tiny": "classifier.2",
    "efficientnet_v2_s": "classifier.1",
}


@pytest.fixture(scope="module")
def imagenet_like() -> dict[str, torch.Tensor]:
    """A state dict of torchvision's own ResNet-18: three channels, 1000 classes, random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = torchvision.models.resnet18(weights=None)
        model.train()
        model(torch.rand(4, 3, 64, 64))  # so that running statistics are not all 0 and 1
    return dict(model.state_dict())


class _Garbage(http.server.BaseHTTPRequestHandler):
    """A proxy that answers no request in HTTP."""

    def do_CONNECT(self) -> None:
        self.wfile.write(b"login first\r\n\r\n")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's, and a proxy that nobody listens at; the folder of the cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # Python's: it remembers the first proxy
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def strange_proxy(no_network: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Garbage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def cached_file(folder: Path, backbone: str = "resnet18") -> Path:
    url: str = torchvision.models.get_model_weights(backbone).DEFAULT.url
    return folder / url.rsplit("/", 1)[-1]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def fill(model: nn.Module, weights: str, seed: int = 0) -> Initialisation:
    return initialise(model, ModelConfig(weights=weights), seed=seed)


# --- shape ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_one_channel_in_and_one_logit_out(backbone: str) -> None:
    model = build_model(backbone).eval()
    name = FIRST_CONV.get(backbone, "conv1")
    reference = getattr(torchvision.models, backbone)(weights=None)
    first, theirs_first = model.get_submodule(name), reference.get_submodule(name)
    assert isinstance(first, nn.Conv2d)
    assert first.in_channels == 1
    for attribute in ("out_channels", "kernel_size", "stride", "padding"):
        assert getattr(first, attribute) == getattr(theirs_first, attribute)
    for size in (32, 80):
        assert model(torch.rand(2, 1, size, size)).shape == (2, 1)
    ours = {name: value.shape for name, value in model.state_dict().items()}
    theirs = {name: value.shape for name, value in reference.state_dict().items()}
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name] != theirs[name]}
    head = HEAD.get(backbone, "fc")
    assert different == {f"{name}.weight", f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_gradcam_layer_gives_the_last_maps(backbone: str) -> None:
    model = build_model(backbone).eval()
    maps: list[torch.Tensor] = []
    handle = gradcam_layer(model).register_forward_hook(lambda m, i, o: maps.append(o.clone()))
    logit = model(torch.rand(1, 1, 96, 96))
    handle.remove()
    head = model.get_submodule(HEAD.get(backbone, "fc"))
    assert isinstance(head, torch.nn.Linear)
    assert maps[0].shape == (1, head.in_features, 3, 3)
    assert logit.shape == (1, 1)


# --- random ---------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build_model("resnet18")
    torch.manual_seed(2)
    two = build_model("resnet18")
    state = torch.get_rng_state()
    assert not torch.equal(weights(one), weights(two))
    told = fill(one, "random", seed=5)
    fill(two, "random", seed=5)
    assert torch.equal(weights(one), weights(two))
    fill(two, "random", seed=6)
    assert not torch.equal(weights(one), weights(two))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on"
    assert told == Initialisation("random", "random weights, seed 5, as configured")


def test_random_weights_keep_the_activations_in_size() -> None:
    model = build_model("resnet18").train()
    fill(model, "random")
    with torch.no_grad():
        logits = model(torch.randn(16, 1, 64, 64))
    assert 0.01 < float(logits.std()) < 10


# --- given weights --------------------------------------------------------------------------------


def test_a_gray_image_gives_the_activations_that_its_three_copies_gave(
    imagenet_like: dict[str, torch.Tensor],
) -> None:
    reference = torchvision.models.resnet18(weights=None)
    reference.load_state_dict(imagenet_like)
    reference.fc = nn.Identity()
    model = build_model("resnet18")
    load_backbone(model, imagenet_like, "the test's")
    model.fc = nn.Identity()
    gray = torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        expected = reference.eval()(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.eval()(gray), expected, atol=1e-4, rtol=1e-4)


def test_a_classifier_of_other_classes_is_left_as_it_is(
    imagenet_like: dict[str, torch.Tensor],
) -> None:
    model = build_model("resnet18")
    before = model.get_submodule("fc").weight.clone()  # type: ignore[operator]
    load_backbone(model, imagenet_like, "the test's")
    assert torch.equal(model.get_submodule("fc").weight, before)  # type: ignore[arg-type]


def test_a_classifier_of_one_output_is_taken() -> None:
    trained, model = build_model("resnet18"), build_model("resnet18")
    load_backbone(model, trained.state_dict(), "the test's")
    assert torch.equal(weights(model), weights(trained))


def test_weights_that_count_no_batches_are_taken(imagenet_like: dict[str, torch.Tensor]) -> None:
    # torchvision's ImageNet weights of ResNet-18 and 34 are of before there was such a count.
    old = {k: v for k, v in imagenet_like.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(imagenet_like)
    model = build_model("resnet18")
    load_backbone(model, old, "the test's")
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], old["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer1.0.conv1.weight": None}, "layer1.0.conv1.weight missing (1 wrong or missing, 0"),
        (
            {"bn1.weight": torch.zeros(3)},
            "bn1.weight (3,) for (64,) (1 wrong or missing, 0 unknown)",
        ),
        ({"head.weight": torch.zeros(1)}, "head.weight (0 wrong or missing, 1 unknown)"),
        ({"conv1.weight": torch.zeros(64, 2, 7, 7)}, "conv1.weight (64, 2, 7, 7) for (64, 1, 7, 7"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    imagenet_like: dict[str, torch.Tensor], change: dict[str, torch.Tensor | None], named: str
) -> None:
    state = {k: v for k, v in (imagenet_like | change).items() if v is not None}
    model = build_model("resnet18")
    before = weights(model)
    with pytest.raises(ConfigError, match=f"model.weights: mine does not fit: {re.escape(named)}"):
        load_backbone(model, state, "mine")
    assert torch.equal(weights(model), before)


def test_weights_of_another_backbone_are_refused(imagenet_like: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"mine does not fit: .* \(\d+ wrong or missing, "):
        load_backbone(build_model("resnet50"), imagenet_like, "mine")


def test_a_file_of_weights_is_loaded(
    imagenet_like: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(imagenet_like, path)
    model = build_model("resnet18")
    told = fill(model, str(path))
    assert told == Initialisation("file", f"weights of {path}")
    assert torch.equal(model.state_dict()["bn1.running_mean"], imagenet_like["bn1.running_mean"])
    # What the file does not hold comes from the seed.
    again = build_model("resnet18")
    fill(again, str(path))
    assert torch.equal(weights(again), weights(model))


@pytest.mark.parametrize(("ema", "taken"), [(None, 1.0), (2.0, 2.0)])
def test_of_a_checkpoint_those_weights_are_taken_that_it_scores_with(
    tmp_path: Path, ema: float | None, taken: float
) -> None:
    def fill_with(value: float) -> dict[str, torch.Tensor]:
        return {
            k: torch.full_like(v, value) for k, v in build_model("resnet18").state_dict().items()
        }

    path, model = tmp_path / "epoch-0001.pt", build_model("resnet18")
    averaged = None if ema is None else fill_with(ema)
    torch.save({"model": fill_with(1.0), "ema": averaged, "epoch": 1, "config": {}}, path)
    fill(model, str(path))
    assert model.state_dict()["conv1.weight"].unique().tolist() == [taken]


def test_weights_beside_the_arguments_of_their_training_are_taken(
    tmp_path: Path, imagenet_like: dict[str, torch.Tensor]
) -> None:
    """As DINO saves them."""
    path, model = tmp_path / "dino.pth", build_model("resnet18")
    torch.save({"teacher": imagenet_like, "args": argparse.Namespace(lr=0.1), "epoch": 9}, path)
    fill(model, str(path))
    assert torch.equal(model.state_dict()["bn1.running_mean"], imagenet_like["bn1.running_mean"])


def test_an_absent_file_lists_what_can_be_given(tmp_path: Path) -> None:
    message = (
        r"model\.weights: '.*imagnet' is no file; give 'imagenet', 'random', a run, or the path"
    )
    with pytest.raises(ConfigError, match=message):
        fill(build_model("resnet18"), str(tmp_path / "imagnet"))
    with pytest.raises(UserError, match="'pipe:' URLs are refused"):
        fill(build_model("resnet18"), "pipe:cat weights.pt")


class _Malice:
    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("/nonexistent"),))


@pytest.mark.parametrize(
    "content",
    [_Malice(), [1, 2], torch.zeros(3), {"model": {"lr": 0.1}}, {"a": 3}],
    ids=["code", "list", "tensor", "nested", "number"],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"model\.weights: .*weights\.pt is no .*state dict"):
        fill(build_model("resnet18"), str(path))


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for data in (b"", b"not a pickle", b"PK\x03\x04 half a zip"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"weights\.pt is no PyTorch state dict"):
            fill(build_model("resnet18"), str(path))


# --- what others trained --------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_torchvisions_weights_of_each_backbone_fit(backbone: str, tmp_path: Path) -> None:
    theirs = getattr(torchvision.models, backbone)(weights=None).state_dict()
    torch.save(theirs, tmp_path / "weights.pt")
    model = build_model(backbone)
    config = ModelConfig.model_validate(
        {"backbone": backbone, "weights": str(tmp_path / "weights.pt")}
    )
    assert initialise(model, config, seed=1).source == "file"
    ours = model.state_dict()
    first = f"{FIRST_CONV.get(backbone, 'conv1')}.weight"
    assert torch.equal(ours[first], theirs[first].sum(1, keepdim=True))
    head = HEAD.get(backbone, "fc")
    rest = [k for k in ours if k != first and not k.startswith(f"{head}.")]
    assert all(torch.equal(ours[k], theirs[k]) for k in rest)


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("teacher",), ("model", "state_dict")])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "backbone.", "encoder.", "model.", "module.encoder_q.", "module.backbone."],
)
def test_an_encoder_is_found_behind_its_prefix(
    imagenet_like: dict[str, torch.Tensor], tmp_path: Path, nest: tuple[str, ...], prefix: str
) -> None:
    body = {f"{prefix}{k}": v for k, v in imagenet_like.items() if not k.startswith("fc.")}
    momentum = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in imagenet_like.items()}
    projection = {f"{prefix}fc.0.weight": torch.ones(128, 512), "queue": torch.ones(128, 8)}
    copy = momentum if prefix == "module.encoder_q." else {}
    content: object = {**copy, **body, **projection}
    for name in reversed(nest):
        content = {"epoch": 3, name: content}
    torch.save(content, tmp_path / "encoder.pt")
    model = build_model("resnet18")
    fill(model, str(tmp_path / "encoder.pt"))
    for key in ("layer4.1.conv2.weight", "bn1.running_mean"):
        assert torch.equal(model.state_dict()[key], imagenet_like[key])


# --- ImageNet -------------------------------------------------------------------------------------


def assert_fell_back(told: Initialisation, model: nn.Module) -> None:
    assert told.fell_back
    assert told.source == "random"
    assert re.match(
        r"ImageNet weights are not available \(.+\): random weights, seed 3, instead; .*"
        r"Set --model\.weights random if that is intended$",
        told.message,
    )
    assert "\n" not in told.message
    random = build_model("resnet18")
    fill(random, "random", seed=3)
    assert torch.equal(weights(model), weights(random))


def test_without_network_and_cache_random_weights_are_taken_and_told(
    no_network: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = build_model("resnet18")
    assert_fell_back(fill(model, "imagenet", seed=3), model)


def test_a_proxy_that_answers_nonsense_is_no_crash(strange_proxy: None) -> None:
    model = build_model("resnet18")
    assert_fell_back(fill(model, "imagenet", seed=3), model)


@pytest.mark.parametrize("data", [b"", b"<html>login</html>", b"PK\x03\x04 half a zip"])
def test_a_broken_cache_is_no_crash(no_network: Path, data: bytes) -> None:
    cached_file(no_network).write_bytes(data)
    model = build_model("resnet18")
    assert_fell_back(fill(model, "imagenet", seed=3), model)


def test_cached_weights_need_no_network(
    no_network: Path, imagenet_like: dict[str, torch.Tensor]
) -> None:
    old = {k: v for k, v in imagenet_like.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, cached_file(no_network))
    model = build_model("resnet18")
    told = fill(model, "imagenet")
    assert told == Initialisation("imagenet", "ImageNet weights of torchvision, channels summed")
    assert torch.equal(
        model.state_dict()["conv1.weight"], imagenet_like["conv1.weight"].sum(1, keepdim=True)
    )
