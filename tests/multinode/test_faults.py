"""Faults in the middle of a training of two workers: it goes on, or says what to do; nothing is
lost, and the curve is that of a run that nobody disturbed."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pneumo.checkpoint import find_index
from tests.multinode.conftest import BUCKET, RUN_TIMEOUT_S, Site, Undisturbed
from tests.multinode.faults import EPOCHS, LARGEST_ELASTIC_DIFFERENCE, Cost, read_losses
from tests.multinode.ray_cluster import Driver

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(420)]

TWO = ("--cluster.num-workers", "2")
ELASTIC = (*TWO, "--cluster.min-workers", "1")
TRAINS_AGAIN = r"model: going on"


def wait_for_the_middle(driver: Driver, run: Path) -> tuple[float, float]:
    """Return after the second epoch: when its checkpoint, written behind the training, was there,
    and now."""
    driver.wait_for_line(r"epoch +2/", timeout_s=RUN_TIMEOUT_S)
    deadline_s = time.monotonic() + 30
    while (index := find_index(str(run))) is None or index.latest.epoch < 2:
        assert time.monotonic() < deadline_s, driver.said
        time.sleep(0.02)
    saved_s = time.monotonic()
    time.sleep(0.6)
    return saved_s, time.monotonic()


def end_well(driver: Driver) -> None:
    assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 0, driver.said
    assert "Traceback" not in driver.said


def count_again(undisturbed: Undisturbed, saved_s: float, fault_s: float) -> int:
    return round((fault_s - saved_s) / undisturbed.step_s)


def test_a_killed_worker_process_is_replaced(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    with site.cluster.driver(*site.train(run, *TWO)) as driver:
        saved_s, fault_s = wait_for_the_middle(driver, run)
        (victim,) = site.cluster.workers[0].processes("ray::RayTrainWorker")
        victim.kill()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert "worker lost" in driver.said
    assert re.search(r"failure 1 of 3: going on with 2 workers after epoch [2-4]", driver.said)
    losses = read_losses(run)
    table.append(
        Cost(
            "worker process killed",
            "2 workers again",
            again_s - fault_s,
            count_again(undisturbed, saved_s, fault_s),
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses


def test_a_killed_node_is_waited_for_when_the_number_is_fixed(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    with site.cluster.driver(*site.train(run, *TWO)) as driver:
        saved_s, fault_s = wait_for_the_middle(driver, run)
        victim = site.cluster.workers[0]
        victim.kill()
        driver.wait_for_line("waiting for room for 2 workers, there is for 1", timeout_s=120)
        site.cluster.add_workers(1)
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert f"worker lost (node {victim.address} does not answer)" in driver.said
    losses = read_losses(run)
    table.append(
        Cost(
            "node killed, replaced",
            "waits, 2 workers again",
            again_s - fault_s,
            count_again(undisturbed, saved_s, fault_s),
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses


def test_an_elastic_run_goes_on_with_what_is_left_and_grows_back(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    with site.cluster.driver(*site.train(run, *ELASTIC, epochs=12)) as driver:
        saved_s, fault_s = wait_for_the_middle(driver, run)
        victim = site.cluster.workers[0]
        victim.kill()
        alone_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        site.cluster.add_workers(1)
        joined_s = time.monotonic()
        grown = "there is room for 2 workers: going on with 2 workers after epoch"
        driver.wait_for_line(grown, timeout_s=120)
        heard = len(driver.lines)
        together_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120, after=heard)
        end_well(driver)
    assert f"worker lost (node {victim.address} does not answer), failure 1 of 3" in driver.said
    assert re.search(r"going on with 1 worker after epoch [2-9]", driver.said)
    losses = read_losses(run, epochs=12)
    table.append(
        Cost(
            "node killed, elastic",
            f"1 worker; 2 again {together_s - joined_s:.0f} s after a node came",
            alone_s - fault_s,
            count_again(undisturbed, saved_s, fault_s),
            losses[EPOCHS - 1],
            undisturbed.losses[-1],
        )
    )
    assert losses[:2] == undisturbed.losses[:2]
    assert losses[:EPOCHS] == pytest.approx(undisturbed.losses, abs=LARGEST_ELASTIC_DIFFERENCE)


def test_a_node_cut_off_from_the_network_is_given_up(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    victim = site.cluster.workers[0]
    with site.cluster.driver(*site.train(run, *ELASTIC)) as driver:
        saved_s, fault_s = wait_for_the_middle(driver, run)
        victim.cut()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=150)
        end_well(driver)
    victim.kill()
    assert f"worker lost (node {victim.address} does not answer)" in driver.said
    losses = read_losses(run)
    table.append(
        Cost(
            "node cut off, silent, elastic",
            "1 worker",
            again_s - fault_s,
            count_again(undisturbed, saved_s, fault_s),
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses[:2] == undisturbed.losses[:2]


def test_a_killed_driver_is_started_again_with_the_same_run(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command) as driver:
        saved_s, fault_s = wait_for_the_middle(driver, run)
        driver.signal(signal.SIGKILL)
        assert driver.wait(timeout_s=20) == -signal.SIGKILL
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    losses = read_losses(run)
    table.append(
        Cost(
            "driver killed, started again",
            "2 workers",
            again_s - driver.started_s,
            count_again(undisturbed, saved_s, fault_s),
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses


def test_sigterm_leaves_a_checkpoint_and_ends_with_130(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command) as driver:
        wait_for_the_middle(driver, run)
        told_s = time.time()
        driver.signal(signal.SIGTERM)
        assert driver.wait(timeout_s=60) == 130, driver.said
    assert (run / "checkpoints" / "index.json").stat().st_mtime > told_s
    shown = set(re.findall(r"epoch +(\d+)/", driver.said))
    assert "interrupted; writing a checkpoint" in driver.said
    assert "the same command goes on from what is finished" in driver.said
    assert "Traceback" not in driver.said
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert shown.isdisjoint(re.findall(r"epoch +(\d+)/", driver.said))
    losses = read_losses(run)
    table.append(
        Cost(
            "SIGTERM to the driver, started again",
            "checkpoint, exit 130",
            again_s - driver.started_s,
            0,
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses


def test_a_node_that_will_be_taken_away_is_left_before(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    victim = site.cluster.workers[0]
    with site.cluster.driver(*site.train(run, *ELASTIC, epochs=12)) as driver:
        fault_s = driver.wait_for_line(r"epoch +2/12 ", timeout_s=RUN_TIMEOUT_S)
        hook = site.cluster.depart(victim, grace_s=60)
        said, _ = hook.communicate(timeout=60)
        assert (hook.returncode, said) == (0, b"")
        assert not victim.processes("ray::RayTrainWorker")
        victim.kill()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert f"node {victim.address} is being taken away: going on with 1 worker" in driver.said
    losses = read_losses(run, epochs=12)
    table.append(
        Cost(
            "node drained, 60 s before its end",
            "checkpoint, 1 worker",
            again_s - fault_s,
            0,
            losses[EPOCHS - 1],
            undisturbed.losses[-1],
        )
    )
    assert losses[:2] == undisturbed.losses[:2]


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost]
) -> None:
    site, run = two_workers, two_workers.small_disk / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command) as driver:
        assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 1
    assert "No space left on device" in driver.lines[-1][1], driver.said
    assert "Traceback" not in driver.said
    subprocess.run(["mount", "-o", "remount,size=900m", str(site.small_disk)], check=True)
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    losses = read_losses(run)
    table.append(
        Cost(
            "full disk, started again with room",
            "said, exit 1",
            again_s - driver.started_s,
            undisturbed.steps_per_epoch,
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses


@pytest.mark.parametrize(
    "away_s", [15, pytest.param(60, marks=pytest.mark.slow)], ids=["15 s", "60 s"]
)
def test_an_object_store_that_is_away_is_waited_for(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path, away_s: int
) -> None:
    site = two_workers
    name = f"away-{away_s}"
    with site.cluster.driver(*site.train(f"s3://{BUCKET}/{name}", *TWO)) as driver:
        driver.wait_for_line(rf"epoch +2/{EPOCHS} ", timeout_s=RUN_TIMEOUT_S)
        site.object_store.cut()
        try:
            time.sleep(away_s)
        finally:
            site.object_store.mend()
        mended_s = time.monotonic()
        again_s = driver.wait_for_line(rf"epoch +3/{EPOCHS} ", timeout_s=120)
        end_well(driver)
    (tmp_path / "metrics.jsonl").write_text(site.fetch(f"{name}/metrics.jsonl"))
    losses = read_losses(tmp_path)
    table.append(
        Cost(
            f"object store away for {away_s} s",
            "waits",
            away_s + max(again_s - mended_s, 0.0),
            0,
            losses[-1],
            undisturbed.losses[-1],
        )
    )
    assert losses == undisturbed.losses
