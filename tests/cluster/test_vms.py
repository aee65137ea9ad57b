"""The VM clusters, checked as `ray up` checks them before it asks a cloud; no cloud is asked."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

from tests import CHECKOUT

DOCKERFILE = (CHECKOUT / "Dockerfile").read_text()
PROVIDERS = ("aws", "gcp", "onprem")
IN_A_CLOUD = PROVIDERS[:2]


def _read(provider: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CHECKOUT / f"cluster/{provider}.yaml").read_text())
    return config


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray remembers an on-prem cluster below its folder for temporary files."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def _prepared(config: dict[str, Any]) -> dict[str, Any]:
    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_takes_it(provider: str) -> None:
    prepared = _prepared(_read(provider))
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_is_installed_on_the_way(provider: str) -> None:
    """Ray's defaults for AWS and GCP call pip, which the image does not hold."""
    prepared = _prepared(_read(provider))
    kinds = ("initialization", "setup", "head_setup", "worker_setup")
    assert [prepared[f"{kind}_commands"] for kind in kinds] == [[], [], [], []]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_token_lies_where_ray_in_the_container_looks(provider: str) -> None:
    """By the command that Ray's launcher starts the container with."""
    config = _read(provider)
    home = re.findall(r"^ +HOME=(\S+)", DOCKERFILE, re.MULTILINE)
    [user_home] = re.findall(r"useradd .*--home-dir (\S+)", DOCKERFILE)
    assert home == [user_home]
    command = docker_start_cmds(
        config["auth"]["ssh_user"], config["docker"]["image"], config["file_mounts"],
        config["docker"]["container_name"], [], config["cluster_name"], home[0], "docker",
    )  # fmt: skip
    assert f"/~/.ray/auth_token:{user_home}/.ray/auth_token " in command


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_image_has_what_the_launcher_calls(provider: str) -> None:
    """rsync and ssh, and on PATH of a login shell, which is not ENV's, ray."""
    [packages] = re.findall(r"--no-install-recommends \\\n +(.*) > /dev/null", DOCKERFILE)
    assert {"rsync", "openssh-client"} <= set(packages.split())
    assert re.search(r"echo 'PATH=/opt/pneumo/bin:\$PATH' > /etc/profile\.d/\w+\.sh", DOCKERFILE)
    asked = {"aws": "boto3", "gcp": "google-api-python-client", "onprem": "ray"}[provider]
    for lock in ("requirements.lock", "requirements-image.lock"):
        assert re.search(rf"^{asked}==", (CHECKOUT / lock).read_text(), re.MULTILINE), lock


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_check_can_fail(provider: str) -> None:
    config = _read(provider)
    config["idle_timeout_minuts"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        _prepared(config)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_run_the_one_image_with_a_token(provider: str) -> None:
    config = _read(provider)
    base = yaml.safe_load((CHECKOUT / "k8s" / "base" / "kustomization.yaml").read_text())
    [image] = base["images"]
    assert config["docker"]["image"] == f"{image['name']}:{image['newTag']}"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    start = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0 --dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("provider", IN_A_CLOUD)
def test_the_head_stays_and_the_workers_are_spot(provider: str) -> None:
    types = _read(provider)["available_node_types"]
    head, workers = types["head"], types["workers"]
    assert head["resources"] == {"CPU": 0}
    assert workers["resources"]["GPU"] == 1
    if provider == "aws":
        assert "START-VMS" in str(head["node_config"]["IamInstanceProfile"])
    spot = {"aws": "'MarketType': 'spot'", "gcp": "'provisioningModel': 'SPOT'"}[provider]
    assert spot in str(workers["node_config"])
    assert spot not in str(head["node_config"])


def test_spot_machines_are_looked_for_in_several_zones() -> None:
    assert len(_read("aws")["provider"]["availability_zone"].split(",")) >= 2


def test_no_security_group_is_left_to_ray() -> None:
    """Its own lets everybody in by SSH."""
    types = _prepared(_read("aws"))["available_node_types"].values()
    assert all(node["node_config"]["SecurityGroupIds"] for node in types)
