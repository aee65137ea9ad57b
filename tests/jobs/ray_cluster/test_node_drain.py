"""What a node does before it goes; that a run follows is shown on nodes, in tests/multinode."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

from jobs.ray_cluster.node_drain import Raylet, list_raylets, main, wait_for_workers


def test_this_machines_raylet_is_found(ray_here: None) -> None:
    context = ray.get_runtime_context()
    assert Raylet(context.get_node_id(), context.gcs_address) in list_raylets()


def test_workers_are_waited_for_but_not_for_ever() -> None:
    title = "import time; time.sleep(60)"
    worker = subprocess.Popen(
        ["ray::RayTrainWorker", "-c", title], executable=sys.executable, stdin=subprocess.DEVNULL
    )
    try:
        assert not wait_for_workers(0.5)
    finally:
        worker.kill()
        worker.wait()


def test_the_grace_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--grace-s" in capsys.readouterr().err
