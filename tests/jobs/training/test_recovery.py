"""Attempts at a run on one local Ray: what is tried again, what ends the job, what is said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.train import WorkerGroupError

from jobs.ray_cluster.nodes import Node, list_nodes, unreachable_addresses, usable_nodes
from jobs.training.job import wait_for_cluster
from jobs.training.messages import Command, Worker, WorkerChannel
from jobs.training.recovery import (
    STOPPED,
    Recovery,
    count_fitting,
    describe_failure,
    describe_position,
    wait_for_workers,
)
from jobs.training.trainer import Training, build_trainer
from pneumo.config import ClusterConfig, Config
from pneumo.config_layers import override
from pneumo.errors import (
    ClusterError,
    ContentError,
    DataError,
    PneumoError,
    RunError,
    StorageError,
)
from pneumo.training.checkpoints import CheckpointEntry, CheckpointIndex
from tests.waiting import wait_until

ONE_CPU = {"CPU": 1.0}
AWAY = StorageError("storage: s3://bucket/store/manifest.json: tried again for 120 s")


def make_index(epoch: int, step: int = 0, *, finished: bool = False) -> CheckpointIndex:
    entry = CheckpointEntry(name="a", epoch=epoch, step=step, val_auroc=None, sha256="")
    return CheckpointIndex(entries=(entry,), finished=finished)


@dataclass
class Script:
    """What happens in each attempt, and at each look at storage: an exception is raised."""

    outcomes: Sequence[Any]
    looks: Sequence[Any] = ()
    sizes: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    looked: int = 0

    def attempt(self, size: int, nodes: Sequence[Node]) -> object:
        self.sizes.append(size)
        outcome = self.outcomes[len(self.sizes) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome(size) if callable(outcome) else outcome

    def look(self, store_url: str, run_url: str) -> CheckpointIndex | None:
        self.looked += 1
        found = self.looks[self.looked - 1] if self.looked <= len(self.looks) else make_index(1)
        if isinstance(found, BaseException):
            raise found
        assert found is None or isinstance(found, CheckpointIndex)
        return found

    def recovery(
        self, channel: WorkerChannel, *, urls: tuple[str, str], **cluster: Any
    ) -> Recovery:
        config = ClusterConfig(**cluster)
        return Recovery(config, ONE_CPU, *urls, channel, self.attempt, self.told.append, self.look)


REMOTE_STORE = ("s3://bucket/store", "/runs/1")
REMOTE_RUN = ("/store", "s3://bucket/runs/1")
ALL_LOCAL = ("/store", "/runs/1")


@pytest.fixture(scope="module")
def channel(ray_here: None) -> Iterator[WorkerChannel]:
    """One for all: an attempt begins by resetting it."""
    channel = WorkerChannel()
    yield channel
    ray.kill(channel.actor)


@pytest.fixture(scope="module")
def died(ray_here: None) -> ray.exceptions.ActorDiedError:
    """What Ray raises when its controller cannot be built, as with its storage away."""

    class Controller:
        def __init__(self) -> None:
            raise OSError("AWS Error NETWORK_CONNECTION")

        def run(self) -> None: ...

    controller = ray.remote(num_cpus=0)(Controller).remote()
    with pytest.raises(ray.exceptions.ActorDiedError) as caught:
        ray.get(controller.run.remote())
    return caught.value


def fail(*causes: BaseException) -> WorkerGroupError:
    return WorkerGroupError("workers failed", dict(enumerate(causes)))


def wait_for_nodes() -> list[Node]:
    """Those with a free CPU: what an earlier test used may not be free at once."""
    return wait_until(lambda: usable_nodes(ONE_CPU), "a node with a free CPU")


def run(
    script: Script, channel: WorkerChannel, urls: tuple[str, str] = REMOTE_RUN, **cluster: Any
) -> None:
    script.recovery(channel, urls=urls, **cluster).run(wait_for_nodes())


# --- what is tried again --------------------------------------------------------------------------


@pytest.mark.parametrize("urls", [REMOTE_STORE, REMOTE_RUN])
def test_an_object_store_that_is_away_is_a_failure_and_is_waited_for(
    channel: WorkerChannel, urls: tuple[str, str]
) -> None:
    script = Script([fail(AWAY), None], [AWAY, AWAY, make_index(2, 3)])
    run(script, channel, urls)
    failure = f"{AWAY}, failure 1 of 3"
    assert script.told == [
        f"{failure}: waiting for storage: {AWAY}",
        f"{failure}: resuming with 1 worker after epoch 2 step 3",
    ]
    assert script.sizes == [1, 1]


def test_a_controller_of_ray_that_dies_is_a_failure(
    channel: WorkerChannel, died: ray.exceptions.ActorDiedError
) -> None:
    script = Script([died, None])
    run(script, channel)
    (line,) = script.told
    assert line.startswith("workers did not start (ActorDiedError: ")
    assert line.endswith("failure 1 of 3: resuming with 1 worker after epoch 1")


def test_failures_are_counted_and_the_last_one_is_raised(
    channel: WorkerChannel, died: ray.exceptions.ActorDiedError
) -> None:
    script = Script([fail(AWAY), died, fail(ValueError("lost")), fail(AWAY)])
    with pytest.raises(WorkerGroupError) as caught:
        run(script, channel, max_failures=3)
    assert caught.value is script.outcomes[3]
    assert len(script.told) == 3


def test_a_worker_lost_after_the_last_checkpoint_does_no_harm(channel: WorkerChannel) -> None:
    script = Script([fail(ValueError("lost"))], [make_index(10, finished=True)])
    run(script, channel, ALL_LOCAL)
    assert script.told == []


def test_a_stop_whose_reason_was_lost_is_no_end(channel: WorkerChannel) -> None:
    script = Script([STOPPED, None])
    run(script, channel)
    assert script.told == ["told to stop: resuming with 1 worker after epoch 1"]


# --- what ends the job ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cause", "urls"),
    [
        (DataError("shard train/000000.tar: missing"), REMOTE_STORE),
        (ContentError("storage: s3://bucket/store/x: changed or damaged"), REMOTE_STORE),
        (RunError("/runs/1: another attempt has claimed this run"), REMOTE_RUN),
        (StorageError("storage: cannot read /store: Input/output error"), ALL_LOCAL),
    ],
)
def test_what_would_only_happen_again_ends_the_job(
    channel: WorkerChannel, cause: PneumoError, urls: tuple[str, str]
) -> None:
    script = Script([fail(cause)])
    with pytest.raises(WorkerGroupError):
        run(script, channel, urls)
    assert script.told == []


def test_storage_that_answers_with_a_refusal_ends_the_wait(channel: WorkerChannel) -> None:
    script = Script([fail(AWAY)], [AWAY, RunError("/runs/1: not yours")])
    with pytest.raises(RunError, match="not yours"):
        run(script, channel)


def test_ray_train_itself_repeats_no_failed_training(channel: WorkerChannel) -> None:
    """Recovery or Tune does, which know what would only happen again."""
    config = override(Config(), {"cluster.use_gpu": False, "cluster.max_failures": 3})
    for of in (channel, None):
        training = Training(config, *ALL_LOCAL, of)
        failures = build_trainer(training, config.cluster).run_config.failure_config
        assert failures.max_failures == 0
        if of is not None:
            assert failures.controller_failure_limit == failures.max_preemption_failures == 0


def test_a_request_to_stop_ends_each_wait(channel: WorkerChannel) -> None:
    script = Script([fail(AWAY)], [AWAY])
    recovery = script.recovery(channel, urls=REMOTE_RUN)
    recovery.tell = lambda line: recovery.stop()
    recovery.run(wait_for_nodes())
    assert script.looked == 1


def test_an_attempt_that_is_told_to_stop_is_the_last(channel: WorkerChannel) -> None:
    script = Script([])
    recovery = script.recovery(channel, urls=REMOTE_RUN)

    def stop(size: int) -> str:
        recovery.stop()
        return STOPPED

    script.outcomes = [stop]
    assert recovery.run(wait_for_nodes())
    assert script.told == []


def test_a_failure_on_the_way_out_writes_no_checkpoint(channel: WorkerChannel) -> None:
    script = Script([])
    recovery = script.recovery(channel, urls=REMOTE_RUN)

    def fail_stopping(size: int) -> str:
        recovery.stop()
        raise fail(AWAY)

    script.outcomes = [fail_stopping]
    assert not recovery.run(wait_for_nodes())
    assert script.told == []


# --- growing back ---------------------------------------------------------------------------------


class _Worker:
    def __init__(self, channel: WorkerChannel) -> None:
        self.heard = channel.listen(0)

    def wait(self) -> bool:
        return self.heard.wait(120)


class _FlakyChannel(WorkerChannel):
    """Its first order is heard, but whoever posts it does not learn of that."""

    def __init__(self) -> None:
        super().__init__()
        self.is_new = True

    def broadcast(self, command: Command) -> None:
        super().broadcast(command)
        if self.is_new:
            self.is_new = False
            raise ray.exceptions.RayActorError


@pytest.mark.parametrize("kind", [WorkerChannel, _FlakyChannel])
def test_an_attempt_of_fewer_workers_is_stopped_when_there_is_room(
    ray_here: None, kind: type[WorkerChannel]
) -> None:
    channel = kind()

    def train_until_told(size: int) -> str:
        worker = ray.remote(num_cpus=0)(_Worker).remote(channel)
        assert ray.get(worker.wait.remote()), "waited 120 s for the command to stop"
        ray.kill(worker)
        return STOPPED

    there = wait_for_nodes()
    most = count_fitting(there, ONE_CPU)
    script = Script([train_until_told, None])
    one = [Node(n.id, n.address, n.port, n.total, ONE_CPU, draining=False) for n in there]
    recovery = script.recovery(channel, urls=REMOTE_RUN, num_workers=most, min_workers=1)
    recovery.run(one)
    assert script.sizes == [1, most]
    assert script.told == [
        f"starting with 1 worker of {most}",
        f"there is room for {most} workers: resuming with {most} workers after epoch 1",
    ]
    ray.kill(channel.actor)


# --- nodes, and what is said of them --------------------------------------------------------------


def make_node(**changes: Any) -> Node:
    known: dict[str, Any] = {
        "id": "a",
        "address": "192.0.2.1",
        "port": 1,
        "total": {"CPU": 8.0, "GPU": 2.0},
        "free": {"CPU": 5.0, "GPU": 2.0},
        "draining": False,
    }
    return Node(**known | changes)


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [({"CPU": 1.0}, 5), ({"CPU": 2.0, "GPU": 1.0}, 2), ({"CPU": 6.0}, 0), ({"TPU": 1.0}, 0)],
)
def test_a_node_takes_as_many_workers_as_its_scarcest_resource(
    wanted: dict[str, float], fits: int
) -> None:
    assert make_node().fits(wanted) == fits
    assert count_fitting([make_node(), make_node(free={})], wanted) == fits


def test_the_nodes_of_this_cluster_answer_and_a_closed_port_does_not(ray_here: None) -> None:
    (here,) = list_nodes()
    assert not here.draining
    assert unreachable_addresses([here]) == set()
    closed = make_node(address="127.0.0.1", port=1)
    assert unreachable_addresses([closed]) == {"127.0.0.1"}


def test_what_a_cluster_lacks_is_said_after_the_wait(ray_here: None) -> None:
    (here,) = list_nodes()
    there = here.total["CPU"]
    message = rf"2 workers need 128000 CPU \(it has {there:g}, [\d.]+ free\); waited 0 s; low"
    with pytest.raises(ClusterError, match=message):
        wait_for_workers(ClusterConfig(num_workers=2), {"CPU": 64_000.0}, timeout_s=0)


def test_gpus_of_nodes_that_join_during_the_wait_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head without CPUs is there first, as after `make up`."""
    head: dict[str, Any] = {"Alive": True, "NodeID": "head", "Resources": {}}
    worker = {"Alive": True, "NodeID": "gpu", "Resources": {"CPU": 4.0, "GPU": 1.0}}
    looks = [0]

    def list_found(of: dict[str, Any]) -> list[Node]:
        looks[0] += 1
        found = [head, worker] if looks[0] > 2 else [head]
        totals = {name: sum(n["Resources"].get(name, 0) for n in found) for name in ("CPU", "GPU")}
        monkeypatch.setattr(ray, "nodes", lambda: found)
        monkeypatch.setattr(ray, "cluster_resources", lambda: totals)
        nodes = [make_node(id=n["NodeID"], free=n["Resources"]) for n in found]
        return [node for node in nodes if node.fits(of)]

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr("jobs.training.recovery.usable_nodes", list_found)
    monkeypatch.setattr("jobs.training.recovery.request_workers", lambda *given: None)
    cluster, nodes = wait_for_cluster(ClusterConfig())
    assert cluster.use_gpu is True
    assert [node.id for node in nodes] == ["gpu"]


def test_a_place_in_a_run_is_said_in_a_few_words() -> None:
    assert describe_position(None) == "from the start"
    assert describe_position(make_index(2)) == "after epoch 2"
    assert describe_position(make_index(0, 7)) == "after epoch 0 step 7"


def test_a_failure_is_said_in_a_few_words(
    ray_here: None, died: ray.exceptions.ActorDiedError
) -> None:
    (here,) = list_nodes()
    mine, gone = Worker(0, here.id, here.address), Worker(1, "f" * 56, "192.0.2.9")
    assert describe_failure(fail(ValueError()), [mine, gone]) == (
        "worker lost (node 192.0.2.9 does not answer)"
    )
    assert describe_failure(fail(died), [mine]) == (
        f"worker lost (its process on node {here.address} ended)"
    )
    closed = RuntimeError("gloo: Connection closed by peer [192.0.2.9]:1234")
    assert describe_failure(fail(closed), [mine]) == (
        "worker lost (it closed its connection to the others)"
    )
    assert describe_failure(fail(ValueError("odd")), [mine]) == "workers failed (ValueError: odd)"
    assert describe_failure(fail(ValueError("odd")), []) == (
        "workers did not start (ValueError: odd)"
    )
