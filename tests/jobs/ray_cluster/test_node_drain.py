"""What a node does before it goes; that a run follows is shown on nodes, in tests/multinode."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
import ray

from jobs.ray_cluster.node_drain import Raylet, is_work, list_raylets, main, wait_for_work


def test_this_machines_raylet_is_found(ray_here: None) -> None:
    context = ray.get_runtime_context()
    assert Raylet(context.get_node_id(), context.gcs_address) in list_raylets()


@pytest.mark.parametrize(
    ("title", "works"),
    [
        ("ray::RayTrainWorker.execute", True),
        ("ray::prepare_shard", True),
        ("ray::IDLE", False),
        ("ray::IDLE_SpillWorker", False),
        ("ray::RuntimeEnvAgent", False),
        ("ray::DashboardAgent", False),
        ("python -m jobs.train", False),
    ],
)
def test_tasks_and_actors_are_work(title: str, *, works: bool) -> None:
    assert is_work(title) is works


def test_work_is_waited_for_but_not_for_ever() -> None:
    words = ["ray::prepare_shard", "-c", "import time; time.sleep(60)"]
    worker = subprocess.Popen(words, executable=sys.executable, stdin=subprocess.DEVNULL)
    ours = psutil.Process().children
    begun_s = time.monotonic()
    try:
        assert not wait_for_work(0.5, ours)
        assert time.monotonic() - begun_s >= 0.5
        threading.Timer(0.5, worker.kill).start()
        assert wait_for_work(60, ours)
        assert time.monotonic() - begun_s >= 1
    finally:
        worker.kill()
        worker.wait()


def test_the_grace_must_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--grace-s" in capsys.readouterr().err
