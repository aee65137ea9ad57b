"""The commands of the Makefile's targets, by `make --dry-run`."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import CHECKOUT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


# Each other variable could be one of the Makefile's.
ENVIRON = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=CHECKOUT,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_runs_on_this_machine_without_an_address() -> None:
    shown = dry_run("train", "STORE=s3://b/store", "RUN=s3://b/run", "ARGS=--recipe fast").stdout
    assert "-m jobs.train --store 's3://b/store' --run 's3://b/run' --recipe fast" in shown


@pytest.mark.parametrize("job", ["train", "tune"])
def test_a_job_is_submitted_to_a_cluster_that_is_named(job: str) -> None:
    shown = dry_run(job, "STORE=s", "RAY_ADDRESS=http://head:8265").stdout
    assert f"-m cluster submit {job} --store 's'" in shown
    assert "jobs." not in shown


@pytest.mark.parametrize("job", ["train", "tune"])
def test_a_job_is_submitted_to_kubernetes(job: str) -> None:
    shown = dry_run(job, "STORE=s", "TARGET=k8s", "OVERLAY=gpu-spot").stdout
    assert f"-m cluster submit --target k8s --overlay 'gpu-spot' {job} --store 's'" in shown
    assert "jobs." not in shown


def test_a_run_is_sent_to_wandb_from_this_machine() -> None:
    for given in (["RAY_ADDRESS=http://head:8265"], ["TARGET=k8s"]):
        assert "-m jobs.track --run 's3://b/1'" in dry_run("track", "RUN=s3://b/1", *given).stdout


def test_an_unknown_target_is_refused() -> None:
    done = dry_run("train", "STORE=s", "TARGET=k9s")
    assert done.returncode == 2
    assert "TARGET=k9s: say TARGET=k8s" in done.stderr


@pytest.mark.parametrize("provider", ["aws", "gcp", "onprem"])
def test_vms_are_started_and_stopped(provider: str) -> None:
    up = dry_run("up", f"PROVIDER={provider}").stdout
    assert f"ray up --yes cluster/'{provider}'.yaml" in up
    assert ("RAY_UP_enable_autoscaler_v2=0 " in up) is (provider == "onprem")
    down = dry_run("down", f"PROVIDER={provider}").stdout
    assert f"ray down --yes cluster/'{provider}'.yaml" in down
    assert "cluster down --target k8s" in dry_run("down", "TARGET=k8s").stdout


@pytest.mark.parametrize("target", ["up", "down", "forward"])
@pytest.mark.parametrize("provider", ["asw", "aws; touch x", "../aws.yaml x"])
def test_an_unknown_provider_is_refused(target: str, provider: str) -> None:
    done = dry_run(target, f"PROVIDER={provider}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "say aws, gcp or onprem" in done.stderr


@pytest.mark.parametrize(
    ("target", "given", "missing"),
    [
        ("up", [], "PROVIDER"),
        ("down", [], "PROVIDER"),
        ("setup-k8s", [], "OVERLAY"),
        ("train", ["STORE=s", "TARGET=k8s"], "OVERLAY"),
        ("prepare", ["STORE=s"], "SOURCE"),
        ("prepare", ["SOURCE=s"], "STORE"),
        ("train", [], "STORE"),
        ("evaluate", ["STORE=s"], "RUN"),
        ("predict", ["SOURCE=s", "RUN=r"], "OUTPUT"),
        ("export", ["RUN=r"], "OUTPUT"),
        ("leave-one-out", ["RUN=r"], "STORES"),
    ],
)
def test_a_missing_argument_is_named(target: str, given: list[str], missing: str) -> None:
    done = dry_run(target, *given)
    assert done.returncode == 2
    assert f"make {target}: say {missing}=" in done.stderr


def test_the_demo_takes_another_store() -> None:
    shown = dry_run("demo", "STORE=s3://b/demo").stdout
    assert "-m jobs.demo --store 's3://b/demo'" in shown
    assert "-m jobs.demo --store 'data/demo/store'" in dry_run("demo").stdout


@pytest.mark.parametrize(
    ("target", "given"),
    [
        ("train", ["STORE"]),
        ("train", ["STORE", "RUN"]),
        ("prepare", ["SOURCE", "STORE"]),
        ("evaluate", ["STORE", "RUN"]),
        ("predict", ["SOURCE", "RUN", "OUTPUT"]),
        ("export", ["RUN", "OUTPUT"]),
        ("leave-one-out", ["STORES", "RUN"]),
        ("demo", ["STORE"]),
        ("setup-k8s", ["OVERLAY", "OVERLAY"]),  # in two of its commands
        ("image", ["IMAGE", "BASE_IMAGE"]),
    ],
)
def test_arguments_are_never_run_as_commands(target: str, given: list[str]) -> None:
    """Each stays one word of the shell."""
    evil = "s3://b/x y;touch '$(id)' `id`"
    shown = dry_run(target, *(f"{name}={evil.replace('$', '$$')}" for name in given)).stdout
    lines = shown.replace("\\\n", " ").splitlines()
    words = [word for line in lines if "s3://" in line for word in shlex.split(line)]
    assert sum(evil in word for word in words) == len(given), shown
    assert "touch" not in words


@pytest.mark.parametrize("has_pip", [True, False])
def test_an_environment_without_pip_is_made_anew(tmp_path: Path, has_pip: bool) -> None:
    """As of a first set-up that was interrupted."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    inside, outside = tmp_path / ".venv" / "bin" / "python", tmp_path / "python"
    inside.parent.mkdir(parents=True)
    inside.write_text("#!/bin/sh\n" + ("" if has_pip else "exit 1\n"))
    outside.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/called\n[ $1 = -c ] || : > {inside}\n")
    for path in (inside, outside):
        path.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={outside}"],
        cwd=tmp_path, env=ENVIRON, capture_output=True, check=False,
    )  # fmt: skip
    called = (tmp_path / "called").read_text()
    assert ("-m venv --clear .venv" in called) is not has_pip
    assert done.returncode == 0, done.stderr


def test_an_image_says_whether_its_checkout_was_changed() -> None:
    asked = "$(git describe --always --dirty --abbrev=40)"
    assert f"--build-arg REVISION={asked}" in dry_run("image").stdout


@pytest.mark.parametrize("has_role", [True, False])
def test_the_role_is_applied_once(tmp_path: Path, has_role: bool) -> None:
    """In the namespace of the overlay that has one, and nowhere else."""
    kubectl, shown = tmp_path / "kubectl", "kind: Role" if has_role else "kind: RoleBinding"
    kubectl.write_text(f'#!/bin/sh\n[ $1 = apply ] && echo $@ || echo "{shown}"\n')
    kubectl.chmod(0o755)
    path = f"PATH={tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "--no-print-directory", "setup-k8s", "OVERLAY=gpu-spot", path],
        cwd=CHECKOUT, env=ENVIRON, capture_output=True, text=True, check=True,
    )  # fmt: skip
    applied = [line.split()[2] for line in done.stdout.splitlines()]
    assert applied == ["k8s/rbac"] * (not has_role) + ["k8s/overlays/gpu-spot"]


def test_an_overlay_is_a_name_or_a_folder(tmp_path: Path) -> None:
    assert "apply -k 'k8s/overlays/gpu-spot'" in dry_run("setup-k8s", "OVERLAY=gpu-spot").stdout
    assert f"apply -k '{tmp_path}'" in dry_run("setup-k8s", f"OVERLAY={tmp_path}").stdout
