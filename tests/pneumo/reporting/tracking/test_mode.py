"""What tracking.mode and the environment come to."""

import pytest

from pneumo.config import TrackingConfig
from pneumo.reporting.tracking.mode import choose_mode

KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("config", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "shared"}, "offline"),
        ("online", {}, "online"),
        ("online", {"WANDB_MODE": "dryrun"}, "offline"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
    ],
)
def test_mode(tmp_path, config, environment, expected):
    found = choose_mode(TrackingConfig(mode=config), {"HOME": str(tmp_path), **environment})
    assert found == expected


def test_a_login_counts_for_its_own_server_only(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    home = {"HOME": str(tmp_path)}
    auto = TrackingConfig(mode="auto")
    assert choose_mode(auto, home) == "online"
    assert choose_mode(auto, {**home, "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    (tmp_path / ".netrc").write_text("no netrc\n")
    assert choose_mode(auto, home) == "offline"


def test_a_login_to_ones_own_server_counts_for_that_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    netrc, saved = tmp_path / ".netrc", tmp_path / ".config" / "wandb" / "settings"
    saved.parent.mkdir(parents=True)
    saved.write_text("[default]\nbase_url = https://wandb.hospital.example\n")
    home, auto = {"HOME": str(tmp_path)}, TrackingConfig(mode="auto")
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert choose_mode(auto, home) == "offline"
    netrc.write_text(f"machine wandb.hospital.example login user password {KEY}\n")
    assert choose_mode(auto, home) == "online"
    assert choose_mode(auto, {**home, "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    assert choose_mode(auto, {**home, "WANDB_CONFIG_DIR": str(tmp_path / "no")}) == "offline"


@pytest.mark.parametrize("saved", ["[default]\nmode = offline\n", "no settings\n"])
def test_wandb_switched_off_for_the_working_folder_is_offline(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(saved)
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": KEY}
    assert choose_mode(TrackingConfig(mode="online"), environment) == "offline"
