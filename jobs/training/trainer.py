"""What Ray Train runs: every worker calls `pneumo.training.fit` as one DDP rank."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.ray_cluster.nodes import Node
from jobs.ray_cluster.session import uses_gpu, worker_resources
from jobs.training.epoch_log import worker_callbacks
from jobs.training.messages import WorkerChannel
from jobs.training.recovery import STOPPED
from pneumo.config import ClusterConfig, Config
from pneumo.errors import PreemptedError
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.sample_order import World
from pneumo.storage.arrow import open_for_ray
from pneumo.training.callbacks import Callbacks

RENDEZVOUS_TIMEOUT_S = 180
"""Time limit for the ranks of an attempt to find each other; after it, another attempt starts."""
WAIT_TIMEOUT_S = 1800
"""Time limit of a collective operation after that. One rank may still read its split, or retry a
storage request, when the others are done; `jobs.training.recovery` finds unreachable nodes within
seconds."""


class TrialContext(Protocol):
    """The search, as seen by a worker that trains one of its trials."""

    def extend(self, callbacks: Callbacks, trial_url: str, world: World) -> Callbacks:
        """`callbacks` that also report each epoch to the search and stop a poor trial."""
        ...

    def fetch_splits(self, image_size: int | None) -> Mapping[str, InMemorySplit]:
        """The splits of this image size that are in the node's shared memory, by name."""
        ...

    def trainings_beside(self, local_size: int) -> int:
        """How many trials may run on a node at a time that runs `local_size` workers of one."""
        ...


@dataclass(frozen=True)
class Training:
    """What every worker of a training receives."""

    config: Config
    store_url: str
    run_url: str
    channel: WorkerChannel | None = None
    """Carries rank 0's messages to the driver, and the driver's commands to the workers."""
    trial_context: TrialContext | None = None
    """The search that this trial belongs to; None outside a search."""


def build_trainer(
    training: Training,
    cluster: ClusterConfig,
    nodes: Sequence[Node] = (),
    callbacks: Sequence[Any] = (),
) -> TorchTrainer:
    """A TorchTrainer in which every worker runs `fit` as one DDP rank, only on `nodes` if given.

    `cluster` gives the number of workers and their resources. A failure ends `TorchTrainer.fit`:
    `Recovery` handles it, or of a trial Tune. Only a trial waits here for workers that do not
    start, or are preempted.
    """
    path, filesystem = open_for_ray(training.run_url)
    repeats = -1 if training.channel is None else 0
    failures = FailureConfig(
        max_failures=0, controller_failure_limit=repeats, max_preemption_failures=repeats
    )
    return TorchTrainer(
        # Not in `train_loop_config`: Ray's controller would unpickle it and import torchvision.
        partial(_train_worker, training),
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
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=failures,
            callbacks=list(callbacks),
        ),
    )


def extend_timeout() -> None:
    """Raise the timeout of collectives to WAIT_TIMEOUT_S, once the ranks have found each other."""
    if dist.is_initialized():
        dist.set_timeout(timedelta(seconds=WAIT_TIMEOUT_S))


def _train_worker(training: Training) -> str | None:
    """The function of each Ray Train worker; returns STOPPED after a "stop" command."""
    from pneumo.training.fit import fit  # takes 3 s of CPU, and the driver does not need it

    config, channel, trial = training.config, training.channel, training.trial_context
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    context = ray.train.get_context()
    world = World(
        context.get_world_rank(), context.get_world_size(), context.get_local_world_size()
    )
    torch.set_num_threads(config.cluster.cpus_per_worker)
    extend_timeout()
    callbacks = worker_callbacks(channel, world)
    if channel is not None:
        callbacks = replace(callbacks, should_stop=channel.listen(world.rank).is_set)
    shared_splits: Mapping[str, InMemorySplit] = {}
    trainings_here = 1
    if trial is not None:
        callbacks = trial.extend(callbacks, training.run_url, world)
        shared_splits = trial.fetch_splits(config.data.image_size)
        trainings_here = trial.trainings_beside(world.local_size)
    try:
        fit(
            config,
            store_url=training.store_url,
            run_url=training.run_url,
            world=world,
            device=ray.train.torch.get_device(),
            callbacks=callbacks,
            shared_splits=shared_splits,
            trainings_here=trainings_here,
        )
    except PreemptedError:
        return STOPPED
    return None
