"""The jobs on four nodes of one CPU each."""

import re
from pathlib import Path

import pytest

from tests.multinode.conftest import RUN_TIMEOUT_S, Site
from tests.multinode.faults import EPOCHS, read_records

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(420)]


def test_prepare_train_and_tune_on_four_nodes(two_workers: Site, tmp_path: Path) -> None:
    site, cluster = two_workers, two_workers.cluster
    cluster.add_workers(2)
    store = tmp_path / "store"
    image_size = ("--prepare.image-size", "64")
    commands = {
        "prepare": ("jobs.prepare", "--source", str(site.source), "--store", str(store)),
        "train": site.train(tmp_path / "run", "--cluster.num-workers", "4", micro_batch_size=4),
        "tune": ("jobs.tune", "--store", str(store), "--run", str(tmp_path / "search")),
    }
    flags = {
        "prepare": image_size,
        "train": (),
        "tune": (
            *("--tune.num-trials", "4", "--tune.epochs", "1", "--tracking.mode", "disabled"),
            *("--model.weights", "random", "--train.batch-size", "16"),
            *("--train.micro-batch-size", "4"),
        ),
    }
    for job, command in commands.items():
        with cluster.driver(*command, *flags[job]) as driver:
            assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 0, driver.said
            assert "Traceback" not in driver.said
    assert (store / "manifest.json").read_bytes() == (site.store / "manifest.json").read_bytes()
    assert len(read_records(tmp_path / "run")) == EPOCHS
    assert "tune: 4 trials of 1 epochs, 4 at a time" in driver.said
    assert (tmp_path / "search" / "best.toml").is_file()


def test_too_few_nodes_are_reported_after_the_start_timeout(
    two_workers: Site, tmp_path: Path
) -> None:
    eight = ("--cluster.num-workers", "8")
    command = two_workers.train(tmp_path / "run", *eight, micro_batch_size=2)
    with two_workers.cluster.driver(*command, "--cluster.start-timeout-s", "3") as driver:
        assert driver.wait(timeout_s=60) == 1
    said = driver.lines[-1][1]
    assert re.search(r"8 workers need 8 CPU \(it has \d+, \d+ free\); waited \d+ s", said), said
