"""Ctrl-C and `cancel`: a job is left running, or stops gently."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.ray import jobs
from cluster.ray.client import Client, connect
from tests import CHECKOUT

if TYPE_CHECKING:
    from tests.cluster.conftest import RayCluster
    from tests.conftest import StoreMaker
from tests.cluster.ray.probes import follow_to_end, make_probe, start


@contextmanager
def _following(
    cluster: RayCluster, job_id: str, until: str = "line 1"
) -> Iterator[subprocess.Popen[str]]:
    """`logs --follow` in a process of its own, which has shown a line of the job."""
    with subprocess.Popen(
        [sys.executable, "-m", "cluster", "logs", job_id, "--follow"],
        env=dict(cluster.environ),
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            while until not in (line := process.stdout.readline()):
                assert line, "the log ended"
            yield process
        finally:
            process.kill()


def test_control_c_detaches_and_cancel_stops_gently(
    client: Client, ray_cluster: RayCluster
) -> None:
    job_id = start(client, make_probe("control-c", 600, 0.1, 0))
    with _following(ray_cluster, job_id) as following:
        following.send_signal(signal.SIGINT)
        _, error = following.communicate(timeout=120)
    assert following.returncode == 130
    detached, hint = error.splitlines()
    assert f"to follow it: python -m cluster logs {job_id} --follow --address" in detached
    assert hint == "Ctrl-C again within 3 s cancels it"
    assert not client.details(job_id).status.is_terminal()
    assert ray_cluster.command("cancel", job_id).stderr == f"{job_id} cancelled\n"
    log, code = follow_to_end(client, job_id)
    assert code == 130
    assert "probe: interrupted" in log


def test_control_c_twice_cancels(client: Client, ray_cluster: RayCluster) -> None:
    job_id = start(client, make_probe("control-c-twice", 600, 0.1, 0))
    with _following(ray_cluster, job_id) as following:
        following.send_signal(signal.SIGINT)
        assert following.stderr is not None
        while "Ctrl-C again" not in (line := following.stderr.readline()):
            assert line, "it ended without a second thought"
        following.send_signal(signal.SIGINT)
        _, error = following.communicate(timeout=120)
    assert following.returncode == 130
    assert error == f"{job_id} cancelled\n"
    assert jobs.state(client.details(job_id)).phase == "cancelled"


@pytest.mark.slow
def test_a_head_that_ignores_control_c_passes_it_on(scripted_cluster: RayCluster) -> None:
    """Jobs install the handler that they did not inherit; of one that does not, it is said."""
    client = connect(scripted_cluster.address, scripted_cluster.environ)
    body = "print('line 1', flush=True) or time.sleep(600)"
    ours = (
        "import sys, time; from jobs.terminal.entry_point import run_main; "
        f"sys.exit(run_main('train', lambda _: {body}))"
    )
    for name, code, told in (
        ("ours", ours, "cancelled"),
        ("stubborn", f"import time; {body}", "cancelled: it did not stop by itself and was killed"),
    ):
        entrypoint = shlex.join(["python", "-c", code])
        job_id = start(client, replace(make_probe(name), entrypoint=entrypoint))
        with _following(scripted_cluster, job_id) as following:
            asked = scripted_cluster.command("cancel", job_id)
            _, followed = following.communicate(timeout=60)
        status = scripted_cluster.command("status", job_id).stdout
        assert asked.stderr.startswith(f"{job_id} {told}"), asked.stderr
        assert followed.startswith(f"{job_id} {told}"), followed
        assert ("was killed" in status) == (name == "stubborn"), status
        assert following.returncode == 130
        assert ("train: interrupted" in client.log_text(job_id)) == (name == "ours")


@pytest.mark.slow
def test_a_training_under_a_head_that_ignores_control_c_writes_a_checkpoint(
    scripted_cluster: RayCluster, tiny_store: StoreMaker, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    asked = scripted_cluster.command(
        *("submit", "--detach", "train", "--store", tiny_store(), "--run", str(run)),
        *("--model.weights", "random", "--train.epochs", "5000", "--train.batch-size", "16"),
        *("--train.micro-batch-size", "16", "--cluster.num-workers", "1"),
    )
    job_id = asked.stdout.strip()
    with _following(scripted_cluster, job_id, until="epoch   2/5000") as following:
        cancelled = scripted_cluster.command("cancel", job_id)
        log, error = following.communicate(timeout=60)
    assert cancelled.stderr == f"{job_id} cancelled\n", cancelled.stderr
    assert (following.returncode, error) == (130, f"{job_id} cancelled\n")
    assert "train: interrupted; writing a checkpoint" in log
    assert "no checkpoint" not in log
    epochs = [int(n) for n in re.findall(r"^epoch +(\d+)/5000 ", log, re.MULTILINE)]
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    latest = index["entries"][-1]
    assert not index["finished"]
    assert latest["epoch"] >= max(epochs, default=2)
