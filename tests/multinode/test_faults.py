"""Faults during a training on two workers: it continues or says what to do, no sample is lost, and
the losses equal those of a run without a fault."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pneumo.training.checkpoints import CheckpointEntry, find_index
from tests.multinode.conftest import BUCKET, RUN_TIMEOUT_S, Site, Undisturbed
from tests.multinode.faults import EPOCHS, LARGEST_DIFFERENCE, Cost, read_records
from tests.multinode.ray_cluster import Driver

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(420)]

TWO = ("--cluster.num-workers", "2")
ELASTIC = (*TWO, "--cluster.min-workers", "1")
TRAINS_AGAIN = r"model: resuming"


def wait_for_mid_training(driver: Driver, run: Path) -> float:
    """Wait until some steps after the second epoch, when its checkpoint is written; the time then,
    by time.monotonic."""
    driver.wait_for_line(r"epoch +2/", timeout_s=RUN_TIMEOUT_S)
    deadline_s = time.monotonic() + 30
    while (index := find_index(str(run))) is None or index.latest.epoch < 2:
        assert time.monotonic() < deadline_s, driver.said
        time.sleep(0.02)
    time.sleep(0.6)
    return time.monotonic()


def end_well(driver: Driver) -> None:
    assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 0, driver.said
    assert "Traceback" not in driver.said


def count_again(driver: Driver) -> int:
    """The number of repeated steps that the driver reports when training first continues."""
    found = re.search(rf"{TRAINS_AGAIN}.*?(?:; (\d+) steps again)?$", driver.said, re.MULTILINE)
    assert found, driver.said
    return int(found[1] or 0)


def count_lost(driver: Driver, latest: CheckpointEntry, undisturbed: Undisturbed) -> int:
    """Steps that a driver's progress bar showed last, minus those in the checkpoint."""
    seen = [int(done) for done in re.findall(r"\| (\d+)/\d+ \[", driver.said)]
    assert seen, driver.said
    kept = latest.epoch * undisturbed.steps_per_epoch + latest.step
    return max(seen[-1] - kept, 0)


def latest_of(run: Path) -> CheckpointEntry:
    index = find_index(str(run))
    assert index is not None
    return index.latest


def report(
    table: list[Cost],
    undisturbed: Undisturbed,
    run: Path,
    fault: str,
    outcome: str,
    *,
    seconds_lost: float,
    steps_again: int,
    epochs: int = EPOCHS,
) -> Cost:
    """Add a row to the table. AssertionError unless every epoch trained on the same number of
    samples and has the same loss as without a fault."""
    cost = Cost(
        fault,
        outcome,
        seconds_lost,
        steps_again,
        read_records(run, epochs),
        undisturbed.records[:epochs],
    )
    table.append(cost)
    assert cost.samples_lost == 0, cost
    assert cost.largest_difference <= LARGEST_DIFFERENCE, cost
    return cost


def test_a_killed_worker_process_is_replaced(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    with site.cluster.driver(*site.train(run, *TWO)) as driver:
        fault_s = wait_for_mid_training(driver, run)
        (victim,) = site.cluster.workers[0].processes("ray::RayTrainWorker")
        victim.kill()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert "worker lost" in driver.said
    assert re.search(r"failure 1 of 3: resuming with 2 workers after epoch [2-4]", driver.said)
    cost = report(
        *(table, undisturbed, run, "worker process killed", "2 workers again"),
        seconds_lost=again_s - fault_s,
        steps_again=count_again(driver),
    )
    assert cost.largest_difference == 0


def test_a_fixed_number_of_workers_waits_for_a_new_node(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    with site.cluster.driver(*site.train(run, *TWO)) as driver:
        fault_s = wait_for_mid_training(driver, run)
        victim = site.cluster.workers[0]
        victim.kill()
        driver.wait_for_line("waiting for 2 workers, and the nodes have room for 1", timeout_s=120)
        site.cluster.add_workers(1)
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert f"worker lost (node {victim.address} does not answer)" in driver.said
    cost = report(
        *(table, undisturbed, run, "node killed, replaced", "waits, 2 workers again"),
        seconds_lost=again_s - fault_s,
        steps_again=count_again(driver),
    )
    assert cost.largest_difference == 0


def test_an_elastic_run_goes_on_with_what_is_left_and_grows_back(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run, epochs = two_workers, tmp_path / "run", len(undisturbed.records)
    with site.cluster.driver(*site.train(run, *ELASTIC, epochs=epochs)) as driver:
        fault_s = wait_for_mid_training(driver, run)
        victim = site.cluster.workers[0]
        victim.kill()
        alone_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        site.cluster.add_workers(1)
        joined_s = time.monotonic()
        grown = "there is room for 2 workers: resuming with 2 workers after epoch"
        driver.wait_for_line(grown, timeout_s=120)
        heard = len(driver.lines)
        together_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120, after=heard)
        end_well(driver)
    assert f"worker lost (node {victim.address} does not answer), failure 1 of 3" in driver.said
    assert re.search(r"resuming with 1 worker after epoch [2-9]", driver.said)
    report(
        *(table, undisturbed, run, "node killed, elastic"),
        f"1 worker; 2 again {together_s - joined_s:.0f} s after a node came",
        seconds_lost=alone_s - fault_s,
        steps_again=count_again(driver),
        epochs=epochs,
    )


def test_training_continues_without_a_node_that_lost_its_network(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    victim = site.cluster.workers[0]
    with site.cluster.driver(*site.train(run, *ELASTIC)) as driver:
        fault_s = wait_for_mid_training(driver, run)
        victim.disconnect()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=150)
        end_well(driver)
    victim.kill()
    assert f"worker lost (node {victim.address} does not answer)" in driver.said
    report(
        *(table, undisturbed, run, "node cut off, silent, elastic", "1 worker"),
        seconds_lost=again_s - fault_s,
        steps_again=count_again(driver),
    )


def test_a_killed_driver_that_is_started_again_resumes_the_run(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command, at_terminal=True) as driver:
        wait_for_mid_training(driver, run)
        latest = latest_of(run)
        driver.signal(signal.SIGKILL)
        assert driver.wait(timeout_s=20) == -signal.SIGKILL
    lost = count_lost(driver, latest, undisturbed)
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    cost = report(
        *(table, undisturbed, run, "driver killed, started again", "2 workers"),
        seconds_lost=again_s - driver.started_s,
        steps_again=lost,
    )
    assert cost.largest_difference == 0


def test_sigterm_writes_a_checkpoint_and_ends_with_130(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run = two_workers, tmp_path / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command, at_terminal=True) as driver:
        wait_for_mid_training(driver, run)
        told_s = time.time()
        driver.signal(signal.SIGTERM)
        assert driver.wait(timeout_s=60) == 130, driver.said
    assert (run / "checkpoints" / "index.json").stat().st_mtime > told_s
    shown = set(re.findall(r"epoch +(\d+)/", driver.said))
    assert "interrupted; writing a checkpoint" in driver.said
    assert "repeat the command to resume from what is finished" in driver.said
    assert "Traceback" not in driver.said
    lost = count_lost(driver, latest_of(run), undisturbed)
    assert lost == 0
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert shown.isdisjoint(re.findall(r"epoch +(\d+)/", driver.said))
    cost = report(
        *(table, undisturbed, run, "SIGTERM to the driver, started again", "checkpoint, exit 130"),
        seconds_lost=again_s - driver.started_s,
        steps_again=lost,
    )
    assert cost.largest_difference == 0


def test_training_leaves_a_node_that_is_drained(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run, epochs = two_workers, tmp_path / "run", len(undisturbed.records)
    victim = site.cluster.workers[0]
    with site.cluster.driver(*site.train(run, *ELASTIC, epochs=epochs)) as driver:
        fault_s = driver.wait_for_line(rf"epoch +2/{epochs} ", timeout_s=RUN_TIMEOUT_S)
        hook = site.cluster.drain(victim, grace_s=60)
        said, _ = hook.communicate(timeout=60)
        assert (hook.returncode, said) == (0, b"")
        assert not victim.processes("ray::RayTrainWorker")
        victim.kill()
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    assert f"node {victim.address} is draining: resuming with 1 worker" in driver.said
    again = count_again(driver)
    assert again == 0
    report(
        *(table, undisturbed, run, "node drained, 60 s before its end", "checkpoint, 1 worker"),
        seconds_lost=again_s - fault_s,
        steps_again=again,
        epochs=epochs,
    )


def test_a_full_disk_is_reported_and_the_run_resumes_when_there_is_room(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost]
) -> None:
    site, run = two_workers, two_workers.small_disk / "run"
    command = site.train(run, *TWO)
    with site.cluster.driver(*command, at_terminal=True) as driver:
        assert driver.wait(timeout_s=RUN_TIMEOUT_S) == 1
    assert "No space left on device" in driver.lines[-1][1], driver.said
    assert "Traceback" not in driver.said
    assert f"epoch   {EPOCHS}/" not in driver.said, "it ends when it is full, not at its end"
    lost = count_lost(driver, latest_of(run), undisturbed)
    subprocess.run(["mount", "-o", "remount,size=900m", str(site.small_disk)], check=True)
    with site.cluster.driver(*command) as driver:
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=120)
        end_well(driver)
    cost = report(
        *(table, undisturbed, run, "full disk, started again with room", "said, exit 1"),
        seconds_lost=again_s - driver.started_s,
        steps_again=lost,
    )
    assert cost.largest_difference == 0


OUTAGE_S = 60


def test_training_waits_for_an_object_store_that_is_unreachable_for_a_minute(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    """Both the run and the data are in it, and the data is read continuously."""
    site, run_url = two_workers, f"s3://{BUCKET}/away"
    command = site.train(run_url, *TWO, "--data.cache", "stream", store=site.stored_copy)
    with site.cluster.driver(*command) as driver:
        driver.wait_for_line(rf"epoch +2/{EPOCHS} ", timeout_s=RUN_TIMEOUT_S)
        with site.without_object_store():
            time.sleep(OUTAGE_S)
        mended_s = time.monotonic()
        again_s = driver.wait_for_line(rf"epoch +3/{EPOCHS} ", timeout_s=120)
        end_well(driver)
    assert "failure" not in driver.said
    (tmp_path / "metrics.jsonl").write_text(site.fetch("away/metrics.jsonl"))
    cost = report(
        *(table, undisturbed, tmp_path, f"object store away for {OUTAGE_S} s", "waits"),
        seconds_lost=OUTAGE_S + max(again_s - mended_s, 0.0),
        steps_again=0,
    )
    assert cost.largest_difference == 0


def test_a_worker_lost_during_an_outage_of_the_object_store_is_replaced_after_it(
    two_workers: Site, undisturbed: Undisturbed, table: list[Cost], tmp_path: Path
) -> None:
    site, run_url = two_workers, f"s3://{BUCKET}/lost"
    with site.cluster.driver(*site.train(run_url, *TWO, store=site.stored_copy)) as driver:
        driver.wait_for_line(rf"epoch +2/{EPOCHS} ", timeout_s=RUN_TIMEOUT_S)
        fault_s = time.monotonic()
        with site.without_object_store():
            (victim,) = site.cluster.workers[0].processes("ray::RayTrainWorker")
            victim.kill()
            time.sleep(OUTAGE_S / 2)
        again_s = driver.wait_for_line(TRAINS_AGAIN, timeout_s=150)
        end_well(driver)
    assert re.search(r"worker lost .*, failure 1 of 3: resuming with 2 workers", driver.said)
    (tmp_path / "metrics.jsonl").write_text(site.fetch("lost/metrics.jsonl"))
    cost = report(
        *(table, undisturbed, tmp_path, f"worker killed, object store away for {OUTAGE_S // 2} s"),
        "waits, 2 workers again",
        seconds_lost=again_s - fault_s,
        steps_again=count_again(driver),
    )
    assert cost.largest_difference == 0
