"""The image: what it is built from agrees with the rest; built and run where that can be done."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from cluster.ray import jobs, sent_code
from pneumo.version import REVISION
from tests import CHECKOUT

DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()
HARDENED = (
    "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--user", "1000:100", "--env", "HOME=/tmp", "--network", "none", "--shm-size", "1g",
)  # fmt: skip
"""As the pods of k8s/base run it, and without a network."""


def _pins(lock: str) -> dict[str, str]:
    return dict(
        re.findall(
            r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", (CHECKOUT / lock).read_text(), re.MULTILINE
        )
    )


def _base() -> dict[str, object]:
    spec: dict[str, object] = yaml.safe_load((CHECKOUT / "k8s/base/rayjob.yaml").read_text())[
        "spec"
    ]["rayClusterSpec"]
    return spec


def test_the_images_versions_are_those_of_the_tests() -> None:
    image, all_of_them = _pins("requirements-image.lock"), _pins("requirements.lock")
    assert len(image) > 100
    assert {name: all_of_them.get(name) for name in image} == image
    assert not {"pytest", "mypy", "ruff", "moto", "pip-tools"} & set(image)


def test_ray_is_one_version_everywhere() -> None:
    cluster = _base()
    [container] = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]  # type: ignore[index]
    checked = container["args"][container["args"].index("--ray") + 1]
    versions = {
        _pins("requirements.lock")["ray"],
        _pins("requirements-image.lock")["ray"],
        cluster["rayVersion"],
        checked,
    }
    assert len(versions) == 1


def test_python_is_one_version_everywhere() -> None:
    [base] = re.findall(r"ARG BASE_IMAGE=\S*python:(\d\.\d+)-", DOCKERFILE)
    assert set(re.findall(r"python(\d\.\d+) -m venv", DOCKERFILE)) == {base}
    assert base in jobs.PYTHONS
    heads = [
        re.findall(r"with Python (\d\.\d+)", (CHECKOUT / lock).read_text())[0]
        for lock in ("requirements.lock", "requirements-image.lock")
    ]
    assert heads == [base, base]


def test_the_release_is_one_version_everywhere() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    kustomization = yaml.safe_load((CHECKOUT / "k8s/base/kustomization.yaml").read_text())
    assert kustomization["images"][0]["newTag"] == project
    assert re.findall(r"ARG VERSION=(\S+)", DOCKERFILE) == [project]


def test_dependencies_are_a_layer_of_their_own_and_the_user_is_nobody_special() -> None:
    lines = DOCKERFILE.splitlines()
    stage = lines.index("FROM ${BASE_IMAGE} AS dependencies")
    last_stage = lines.index("FROM ${BASE_IMAGE}")
    copied = [line for line in lines[stage:last_stage] if line.startswith("COPY")]
    assert copied == ["COPY requirements-image.lock /"]
    order = [line.split()[-1] for line in lines[last_stage:] if line.startswith("COPY")]
    assert order == ["/opt/pneumo", "/app/pneumo", "/app/jobs"]
    assert "USER 1000:100" in lines
    assert "--require-hashes" in DOCKERFILE
    uninstalled = [line for line in lines if "pip uninstall" in line]
    assert len(uninstalled) == 2  # the environment's, and the base's in the image that is kept
    assert lines.index(uninstalled[0]) < last_stage < lines.index(uninstalled[1])
    assert f"ENV {REVISION}=${{REVISION}}" in lines
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in DOCKERFILE


def test_only_code_goes_into_the_image() -> None:
    allowed = [
        line
        for line in (CHECKOUT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert allowed[0] == "*"
    assert {line for line in allowed if line.startswith("!")} == {
        "!pneumo",
        "!jobs",
        "!requirements-image.lock",
    }
    # Of what is let in, what a job's package leaves out as likely secrets; the last match counts.
    refused = allowed[allowed.index("!requirements-image.lock") :]
    assert {f"**/{name}" for name in sent_code.SECRET_LIKE} <= set(refused)


@pytest.fixture(scope="module")
def image() -> tuple[str, str]:
    """The container tool and an image that it has; built here when there is a base to build on."""
    tools = [tool for tool in ("podman", "docker") if shutil.which(tool)]
    works = [t for t in tools if subprocess.run([t, "info"], capture_output=True).returncode == 0]
    if not works:
        pytest.skip("neither podman nor docker works here")
    tool = works[0]
    built, base = os.environ.get("TEST_IMAGE"), os.environ.get("TEST_BASE_IMAGE")
    if built:
        return tool, built
    if not base:
        pytest.skip(
            "set TEST_IMAGE to an image of `make image`, or TEST_BASE_IMAGE to one with Debian's "
            "apt and Python 3.11 to build it on"
        )
    name = "pneumo:test"
    subprocess.run(
        [tool, "build", "--tag", name, "--build-arg", f"BASE_IMAGE={base}", str(CHECKOUT)],
        check=True,
        timeout=3000,
    )
    return tool, name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_runs_jobs_hardened_as_in_the_pods(
    image: tuple[str, str], tmp_path: Path
) -> None:
    tool, name = image
    tmp_path.chmod(0o777)
    # Not `! command`: bash's -e takes that for a test that was meant to fail.
    absent = "for tool in gcc pip pip3; do if command -v $tool; then exit 9; fi; done"
    script = (
        "set -e; cd /tmp; python -m pneumo.synthetic --out /data/source --studies 60;"
        " python -m jobs.preflight --reads /data/source --writes /data/store;"
        " python -m jobs.prepare --source /data/source --store /data/store"
        " --prepare.image-size 64;"
        " WANDB_MODE=disabled python -m jobs.train --store /data/store --run /data/run"
        " --recipe fast --data.image-size 64 --train.epochs 1 --train.batch-size 16;"
        f" {absent}; if python -m pip --version; then exit 9; fi;"
        " id -u; touch /app/x 2>&1 | grep -o Read-only || true"
    )
    done = subprocess.run(
        [tool, "run", "--rm", *HARDENED, "-v", f"{tmp_path}:/data", name, "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["1000", "Read-only"]
    assert (tmp_path / "run" / "checkpoints" / "index.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_rays_launcher_finds_what_it_calls(image: tuple[str, str]) -> None:
    """In the shells and by the commands of `ray up`, which a container of a VM hears."""
    tool, name = image
    started = subprocess.run(
        [tool, "run", "--rm", "-d", "-it", "--network", "none", name, "bash"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    container = started.stdout.strip()
    try:
        said = []
        for command in (
            # As ray.autoscaler._private.command_runner writes them.
            ["bash", "--login", "-c", "-i", "true && source ~/.bashrc; ray --version"],
            ["printenv", "HOME"],
            ["rsync", "--version"],
            ["gcc", "--version"],  # for torch.compile
            ["bash", "--login", "-c", "command -v ssh; touch ~/.ray/x && echo writable"],
            ["bash", "--login", "-c", "python -c 'import boto3, googleapiclient.discovery'"],
        ):
            done = subprocess.run(
                [tool, "exec", container, *command],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, (command, done.stdout + done.stderr)
            said.append(done.stdout.strip())
    finally:
        subprocess.run([tool, "kill", container], capture_output=True, check=False)
    assert said[0] == f"ray, version {_pins('requirements-image.lock')['ray']}"
    assert said[1] == "/home/pneumo"
    assert said[4].splitlines()[-1] == "writable"
