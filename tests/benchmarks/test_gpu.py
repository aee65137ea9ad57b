"""The GPU benchmark, on a CPU: it runs, it counts right, and its data path is pneumo's."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pneumo.config import AugmentConfig
from pneumo.loading import augmentation
from pneumo.network.backbones import build_model
from tests.benchmarks import gpu

SCRIPT = Path(gpu.__file__)
KEYS = [f"study-{i}" for i in range(24)]
SIDE = 48


def run_alone(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The script as on a machine that has nothing of this project: its packages are not found."""
    for absent in ("pneumo", "jobs", "tests", "ray", "cv2", "pydantic", "torchvision"):
        (folder / absent).mkdir(exist_ok=True)
        (folder / absent / "__init__.py").write_text("raise ImportError('not on this machine')\n")
    script = folder / SCRIPT.name
    script.write_bytes(SCRIPT.read_bytes())
    return subprocess.run(
        [sys.executable, str(script), "--smoke", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_runs_with_torch_alone_and_tells_what_fails(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    flags = [
        "--paths",
        "host",
        "thread",
        "ahead",
        "--batch-sizes",
        "64",
        "8",
        "--json",
        str(figures),
    ]
    done = run_alone(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    rows = {row["path"]: row for row in found["rows"]}
    assert set(rows) == {"none", "host", "thread"}
    bare, host = rows["none"], rows["host"]
    assert bare["data_fraction"] is None
    assert host["data_fraction"] == pytest.approx(1 - bare["step_ms"] / host["step_ms"])
    assert host["rsna_epoch_s"] == pytest.approx(21_347 / host["images_per_s"])
    # A batch larger than the data, and a stream without a GPU.
    assert [failure["what"] for failure in found["failures"]] == ["eager 64", "eager 8 ahead"]
    assert "eager 64: failed: ValueError: a batch of 64 is more than the 32 images" in done.stdout


def test_nothing_measured_is_an_error(tmp_path: Path) -> None:
    assert run_alone(tmp_path, "--batch-sizes", "64").returncode == 1


def test_draws_are_those_of_training() -> None:
    uniforms = gpu.draw_by_hash(KEYS, seed=3, epoch=5)
    config = AugmentConfig()
    tables = augmentation.draw_tables(KEYS, config, seed=3, epoch=5)
    np.testing.assert_allclose(
        gpu.build_tables(uniforms).numpy() * gpu.STD + gpu.MEAN, tables / 255, atol=1e-6
    )
    pixels = augmentation.draw_affine(KEYS, config, image_size=SIDE, seed=3, epoch=5)
    ours = gpu.build_matrices(uniforms).numpy()
    np.testing.assert_allclose(ours[:, :, :2], pixels[:, :, :2], atol=1e-12)
    # Where the centre comes from: 0 on its axes, (side - 1) / 2 in pixels.
    center = np.full(2, (SIDE - 1) / 2)
    moved = pixels[:, :, :2] @ center + pixels[:, :, 2] - center
    np.testing.assert_allclose(ours[:, :, 2] * SIDE / 2, moved, atol=1e-9)


def test_images_are_those_of_training() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (len(KEYS), SIDE, SIDE), dtype=np.uint8)
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 4) for image in noise])
    images = torch.from_numpy(smooth).unsqueeze(1)
    trained_on = augmentation.augment(
        images, KEYS, AugmentConfig(), seed=1, epoch=2, moments=(gpu.MEAN, gpu.STD)
    )
    uniforms = gpu.draw_by_hash(KEYS, seed=1, epoch=2)
    ours = gpu.augment_rows(images, torch.arange(len(KEYS)), uniforms.float())
    levels = (ours - trained_on).abs() * gpu.STD * 255
    # OpenCV places pixels to 1/32: a level, and more only where black from outside comes in.
    assert levels.quantile(0.95) <= 1.5
    untouched = levels[..., 8:-8, 8:-8]
    assert untouched.max() <= 2.5
    unchanged = augmentation.normalise(images.float(), gpu.MEAN, gpu.STD)
    assert (unchanged - ours).abs().max() > 0.5


def test_host_and_device_paths_give_each_image_once_an_epoch() -> None:
    data = gpu.Data(30, 32, 8, torch.device("cpu"))
    orders = data.orders()
    first = [next(orders) for _ in range(data.steps)]
    assert [epoch for epoch, _ in first] == [0, 0, 0]
    assert next(orders)[0] == 1
    assert len(set(torch.cat([rows for _, rows in first]).tolist())) == 24
    for path in ("host", "thread", "device"):
        changed, targets = next(data.feed(path))
        assert changed.shape == (8, 1, 32, 32)
        assert changed.dtype == targets.dtype == torch.float32
        assert set(targets.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("side", [64, 96, 224])
def test_flops_and_activations_are_counted_right(side: int) -> None:
    model = gpu.ResNet18().eval()
    counted = 0

    def add(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal counted
        counted += output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, side, side))
    assert gpu.count_forward_flops(side) == counter.get_total_flops()
    assert gpu.count_activations(side) == counted


def test_the_network_is_the_one_that_is_trained() -> None:
    torch.manual_seed(0)
    ours, trained = gpu.ResNet18(), build_model("resnet18")
    images = torch.randn(4, 1, 64, 64)
    ours.load_state_dict(trained.state_dict())
    for mode in (True, False):  # training moves the running statistics
        torch.testing.assert_close(ours.train(mode)(images), trained.train(mode)(images))
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_a_thread_changes_nothing() -> None:
    data = gpu.Data(30, 32, 8, torch.device("cpu"))
    for (images, targets), (threaded, same) in islice(
        zip(data.feed("host"), data.feed("thread"), strict=False), 4
    ):
        assert torch.equal(images, threaded)
        assert torch.equal(targets, same)


def test_peaks_are_the_devices_or_given() -> None:
    smoke = gpu.parse(["--smoke"])
    assert gpu.find_peaks(smoke) == (1.0, 0.1)
    on_cpu = gpu.parse(["--device", "cpu"])
    assert gpu.find_peaks(on_cpu) is None
    half = gpu.parse(["--device", "cpu", "--peak-tflops", "100"])
    assert gpu.find_peaks(half) is None
    given = gpu.parse(["--device", "cpu", "--peak-tflops", "100", "--peak-tb-per-s", "2"])
    assert gpu.find_peaks(given) == (100.0, 2.0)


def test_an_unknown_device_is_refused_rather_than_taken_for_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--device", "cpu"]) == 2
    assert "no peaks known of CPU; give --peak-tflops" in capsys.readouterr().err
