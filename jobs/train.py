"""Train one model: Ray Train starts the workers, each of which calls `pneumo.training.fit`."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from datetime import timedelta
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.ray_cluster.nodes import Node
from jobs.ray_cluster.session import (
    ray_session,
    settle_devices,
    start_timeout_s,
    uses_gpu,
    worker_resources,
)
from jobs.terminal.entry_point import new_run_url, run_job, say
from jobs.tracking.sending import following
from jobs.training.epoch_log import Follower, worker_hooks
from jobs.training.messages import Mailbox
from jobs.training.recovery import STOPPED, Recovery, wait_for_workers
from jobs.training.stop_signal import Board
from jobs.tuning.trial_judge import Shared, TrialJudge
from pneumo import storage
from pneumo.config import (
    WEIGHTS_WITHOUT_FILE,
    ClusterConfig,
    Config,
    Invocation,
    TrainArguments,
    override,
)
from pneumo.dataset.shards import read_manifest
from pneumo.errors import PreemptedError
from pneumo.loading.sample_order import World
from pneumo.reporting.tracking import prepare_tracking
from pneumo.training.checkpoints import CheckpointIndex, read_index
from pneumo.training.fit import check_run, fit

RENDEZVOUS_TIMEOUT_S = 180
"""Within which the ranks of an attempt must find each other; else another is begun."""
WAIT_TIMEOUT_S = 1800
"""How long ranks wait for one another afterwards. One reads its split, or tries storage again and
again, while the others are done; silent nodes are found by the board within seconds."""
LEAVE_TIMEOUT_S = 25.0
"""Kubernetes kills 30 s after its SIGTERM."""


def train(invocation: Invocation) -> None:
    """Train on `--store`, leaving the run in `--run`."""
    arguments, config = invocation.arguments, with_absolute_weights(invocation.config)
    assert isinstance(arguments, TrainArguments)
    store_url = storage.normalise(arguments.store)
    run_url = storage.normalise(arguments.run) if arguments.run else new_run_url("train")
    manifest = read_manifest(store_url)
    check_run(config, manifest, run_url, num_workers=config.cluster.num_workers)
    storage.write_text(storage.join(run_url, "config.json"), config.to_json())
    prepare_tracking(run_url, manifest)
    with (
        ray_session(show_logs=arguments.debug),
        following(run_url, config.tracking, "train", say),
    ):
        index = train_run(config, store_url, run_url)
    report_training(index, run_url, store_url)


def with_absolute_weights(config: Config) -> Config:
    """The same, a path of weights made absolute: workers run in folders of their own."""
    if config.model.weights in WEIGHTS_WITHOUT_FILE:
        return config
    return override(config, {"model.weights": storage.normalise(config.model.weights)})


def train_run(config: Config, store_url: str, run_url: str) -> CheckpointIndex:
    """Train in the Ray session that is open; follow it on the screen."""
    cluster = settle_devices(config.cluster)
    wanted = worker_resources(cluster)
    nodes = wait_for_workers(
        cluster, wanted, timeout_s=start_timeout_s(cluster, cluster.fewest_workers)
    )
    messages, board = Mailbox(), Board()

    def attempt(num_workers: int, nodes: Sequence[Node]) -> object:
        fixed = cluster.model_copy(update={"num_workers": num_workers})
        trainer = build_trainer(
            config, store_url, run_url, messages, cluster=fixed, board=board, nodes=nodes
        )
        return trainer.fit().return_value

    recovery = Recovery(cluster, wanted, store_url, run_url, board, attempt, messages.put)
    try:
        training = _start(lambda: recovery.run(nodes))
        try:
            Follower(messages, epochs=config.train.epochs).follow(training)
        except KeyboardInterrupt:
            leave(recovery.leave, training)
            raise
    finally:
        messages.close()
    return read_index(run_url)


def build_trainer(
    config: Config,
    store_url: str,
    run_url: str,
    messages: Mailbox | None,
    callbacks: Sequence[Any] = (),
    *,
    cluster: ClusterConfig | None = None,
    board: Board | None = None,
    nodes: Sequence[Node] = (),
    shared: Shared | None = None,
) -> TorchTrainer:
    """A TorchTrainer whose every worker runs `fit` as one DDP rank, on `nodes` if there are any.

    `cluster` says how many there are and what each gets, where that is not what the configuration
    says, which a checkpoint keeps. With a board, workers stop when it says so, and the first
    failure ends the trainer's `fit`: `Recovery` deals with it. `shared` makes it a trial of a
    search.
    """
    cluster = cluster or config.cluster
    failures = (
        FailureConfig(max_failures=cluster.max_failures)
        if board is None
        else FailureConfig(max_failures=0, controller_failure_limit=0)
    )
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "store_url": store_url,
            "run_url": run_url,
            "messages": messages,
            "board": board,
            "shared": shared,
        },
        torch_config=TorchConfig(timeout_s=RENDEZVOUS_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=uses_gpu(cluster),
            resources_per_worker=worker_resources(cluster),
            label_selector=(
                {"ray.io/node-id": f"in({','.join(node.id for node in nodes)})"} if nodes else None
            ),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run_url,
            failure_config=failures,
            callbacks=list(callbacks),
        ),
    )


def _start(run: Callable[[], bool]) -> Future[bool]:
    """Begin training in a thread: in the main one Ray Train would take Ctrl-C for itself."""
    training: Future[bool] = Future()

    def run_all() -> None:
        try:
            training.set_result(run())
        except BaseException as error:  # handed to whoever asks the future
            training.set_exception(error)

    threading.Thread(target=run_all, name="training", daemon=True).start()
    return training


def leave(
    order: Callable[[], None], training: Future[bool], timeout_s: float = LEAVE_TIMEOUT_S
) -> None:
    """Ctrl-C, or a scheduler's SIGTERM: have a checkpoint written, but not at any price; what
    `training` comes to says whether it was, or it is said here that it was not."""
    say("train: interrupted; writing a checkpoint (once more leaves without)")
    order()
    done, _ = wait([training], timeout=timeout_s)
    if not done:
        say(f"train: no checkpoint within {timeout_s:.0f} s; going on will be from the one before")
    elif training.exception() is not None or not training.result():
        say("train: no checkpoint could be written; going on will be from the one before")


def report_training(index: CheckpointIndex, run_url: str, store_url: str) -> None:
    """The result in two lines, and what to do next."""
    best = index.best
    auroc = "undefined" if best.val_auroc is None else f"{best.val_auroc:.3f}"
    print(f"best epoch {best.epoch}  val AUROC {auroc}  of {index.latest.epoch} epochs")
    print(f"run {run_url}")
    say(f"next: python -m jobs.evaluate --store {store_url} --run {run_url}")


def wait_longer() -> None:
    """Let the ranks, which have found each other, wait WAIT_TIMEOUT_S for one another."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(seconds=WAIT_TIMEOUT_S))


def _train_worker(settings: dict[str, Any]) -> str | None:
    """What each Ray Train worker runs; STOPPED when it was told to stop."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    )
    config = Config.model_validate(settings["config"])
    torch.set_num_threads(config.cluster.cpus_per_worker)
    wait_longer()
    hooks = worker_hooks(settings["messages"], world, epochs=config.train.epochs)
    board: Board | None = settings["board"]
    if board is not None:
        hooks = replace(hooks, should_stop=board.listen(world.rank).is_set)
    shared: Shared | None = settings["shared"]
    held = {}
    if shared is not None:
        judge = TrialJudge(shared, settings["run_url"], world)
        hooks = judge.hooks(hooks, ray.train.report)
        held = shared.fetch(config.data.image_size)
    try:
        fit(
            config,
            store_url=settings["store_url"],
            run_url=settings["run_url"],
            world=world,
            device=ray.train.torch.get_device(),
            hooks=hooks,
            held=held,
        )
    except PreemptedError:
        return STOPPED
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_job("train", train, argv)


if __name__ == "__main__":
    sys.exit(main())
