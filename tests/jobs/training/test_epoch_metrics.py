"""What Prometheus finds on a node while a worker trains."""

import re
import time
from urllib.request import urlopen

import ray

from jobs.training.epoch_log import worker_callbacks
from pneumo.loading.sample_order import World
from pneumo.training.callbacks import Metrics, StepProgress
from tests.cluster.kuberay.test_alerts import ALERTS


class _Worker:
    def train(self) -> None:
        callbacks = worker_callbacks(None, World(0, 1))
        metrics: Metrics = {"train/loss": 0.5, "images_per_s": 40.0, "data_wait": 0.25}
        callbacks.on_progress(StepProgress(epoch=2, step=7, steps=10, metrics=metrics))


def test_the_alerts_metrics_are_there(ray_here: None) -> None:
    """Those of training; Ray's own, of CPUs and GPUs, come with its nodes."""
    names = set(re.findall(r"ray_pneumo_\w+", ALERTS.read_text()))
    worker = ray.remote(num_cpus=0)(_Worker).remote()
    ray.get(worker.train.remote())
    port = ray.nodes()[0]["MetricsExportPort"]
    found: dict[str, float] = {}
    deadline_s = time.monotonic() + 60
    while set(found) < names and time.monotonic() < deadline_s:
        time.sleep(1.0)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = {
            name: float(line.rsplit(" ", 1)[1])
            for line in lines
            for name in names
            if line.startswith(f"{name}{{")
        }
    assert found == {"ray_pneumo_train_steps": 17.0, "ray_pneumo_train_data_wait": 0.25}
