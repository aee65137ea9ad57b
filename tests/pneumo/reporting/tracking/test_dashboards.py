"""Three views, built without a network or a key."""

import json

import pytest

from pneumo import dashboards


def test_views_name_what_the_jobs_log(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert dashboards.main([]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["Train", "Tune", "Evaluate"]
    text = {name: json.dumps(view) for name, view in found.items()}
    assert "tune/objective" in text["Tune"]  # of the others see tests/jobs


def test_saving_needs_a_team(capsys):
    with pytest.raises(SystemExit, match="2"):
        dashboards.main(["--save"])
    assert "--entity" in capsys.readouterr().err
