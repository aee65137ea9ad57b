"""When Prometheus raises the alerts of the monitoring component, by its own promtool."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import CHECKOUT

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here (apt-get install prometheus)"
)
ALERTS = CHECKOUT / "k8s" / "components" / "monitoring" / "alerts.yaml"
RUN = 'namespace="team",ray_io_cluster="run-1"'


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules as Prometheus itself reads them."""
    spec = yaml.safe_load(ALERTS.read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path / "rules.yaml"


def _promtool(*words: object) -> None:
    done = subprocess.run(
        ["promtool", *map(str, words)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid(rules: Path) -> None:
    _promtool("check", "rules", "--lint=all", "--lint-fatal", rules)


@pytest.mark.parametrize(
    ("alert", "series", "minute", "is_raised"),
    [
        ("PneumoRunStuck", {"ray_pneumo_train_steps": "0+20x60"}, 30, False),
        ("PneumoRunStuck", {"ray_pneumo_train_steps": "0+20x10 200x50"}, 20, False),
        ("PneumoRunStuck", {"ray_pneumo_train_steps": "0+20x10 200x50"}, 30, True),
        # Its workers are gone, its head is not; then the whole run is over.
        (
            "PneumoRunStuck",
            {"ray_pneumo_train_steps": "0+20x10 stale", "ray_node_cpu_count": "2x60"},
            30,
            True,
        ),
        (
            "PneumoRunStuck",
            {"ray_pneumo_train_steps": "0+20x10 stale", "ray_node_cpu_count": "2x10 stale"},
            30,
            False,
        ),
        ("PneumoRunStuck", {"ray_node_cpu_count": "2x60"}, 30, False),
        ("PneumoDataWait", {"ray_pneumo_train_data_wait": "0.1x60"}, 30, False),
        ("PneumoDataWait", {"ray_pneumo_train_data_wait": "0.3x60"}, 5, False),
        ("PneumoDataWait", {"ray_pneumo_train_data_wait": "0.3x60"}, 30, True),
        ("PneumoGpuIdle", {"ray_node_gpus_utilization": "90x60"}, 40, False),
        ("PneumoGpuIdle", {"ray_node_gpus_utilization": "1x60"}, 40, True),
        ("PneumoGpuIdle", {"ray_node_cpu_count": "2x60"}, 40, False),
    ],
)
def test_an_alert_is_raised_when_it_should(
    rules: Path, alert: str, series: dict[str, str], minute: int, is_raised: bool
) -> None:
    raised = f"ALERTS{{alertname='{alert}',alertstate='firing'}}"
    asked: dict[str, Any] = {
        "rule_files": [str(rules)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f"{name}{{{RUN}}}", "values": values}
                    for name, values in series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": f"count({raised})",
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": "{}", "value": 1}] if is_raised else [],
                    }
                ],
            }
        ],
    }
    test = rules.with_name("test.yaml")
    test.write_text(yaml.safe_dump(asked))
    _promtool("test", "rules", test)
