"""Train one model: Ray Train starts the workers, each of which calls `pneumo.training.fit`."""

import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from jobs.joined_store import open_store
from jobs.ray_cluster.nodes import Node
from jobs.ray_cluster.session import ray_session, start_timeout_s, uses_gpu, worker_resources
from jobs.terminal.entry_point import find_run_url, tell
from jobs.tracking.sending import sending_to_wandb
from jobs.training.epoch_log import EpochDisplay
from jobs.training.messages import WorkerChannel
from jobs.training.recovery import Recovery, wait_for_workers
from jobs.training.trainer import Training, build_trainer
from pneumo import background, storage
from pneumo.command_line import Invocation, TrainArguments
from pneumo.config import ClusterConfig, Config
from pneumo.dataset.manifest import read_manifest
from pneumo.reporting.tracking.tracked_run import prepare_tracking
from pneumo.training.checkpoints import CheckpointIndex, find_weights, read_index
from pneumo.training.preconditions import check_run

STOP_TIMEOUT_S = 25.0
"""For the checkpoint of an interrupted run; Kubernetes kills a pod 30 s after SIGTERM."""


def train(invocation: Invocation) -> None:
    """Train on `--store`; writes the run to `--run`."""
    arguments, config = invocation.arguments, find_weights(invocation.config)
    assert isinstance(arguments, TrainArguments)
    run_url = find_run_url("train", arguments.run)
    store_url = open_store(arguments, run_url, seed=config.seed)
    manifest = read_manifest(store_url)
    check_run(config, manifest, run_url, num_workers=config.cluster.num_workers)
    storage.write_text(storage.join(run_url, "config.json"), config.to_json())
    prepare_tracking(run_url, manifest)
    with (
        ray_session(show_logs=arguments.debug),
        sending_to_wandb(run_url, config.tracking, "train", tell),
    ):
        index = train_run(config, store_url, run_url)
    report_training(index, run_url, store_url)


def train_run(config: Config, store_url: str, run_url: str) -> CheckpointIndex:
    """Train in the open Ray session and show the progress in the terminal."""
    cluster, nodes = wait_for_cluster(config.cluster)
    tell(f"train: on {'a GPU for each worker' if cluster.use_gpu else 'CPUs'}")
    wanted = worker_resources(cluster)
    channel = WorkerChannel()
    training = Training(config, store_url, run_url, channel)

    def attempt(num_workers: int, nodes: Sequence[Node]) -> object:
        fixed = cluster.model_copy(update={"num_workers": num_workers})
        return build_trainer(training, fixed, nodes).fit().return_value

    recovery = Recovery(cluster, wanted, store_url, run_url, channel, attempt, channel.put)
    try:
        # In the main thread Ray Train would handle Ctrl-C itself.
        attempts = background.start(lambda: recovery.run(nodes))
        try:
            EpochDisplay(channel.take, epochs=config.train.epochs).follow(attempts)
        except KeyboardInterrupt:
            stop_training(recovery.stop, attempts)
            raise
    finally:
        channel.close()
    return read_index(run_url)


def wait_for_cluster(config: ClusterConfig) -> tuple[ClusterConfig, Sequence[Node]]:
    """`config` with `use_gpu` decided, and nodes with room for its workers. "auto" is decided once,
    when there are nodes: a run that loses its only GPU waits for another, and does not go on on
    CPUs."""

    def wait(cluster: ClusterConfig) -> Sequence[Node]:
        timeout_s = start_timeout_s(cluster, cluster.fewest_workers)
        return wait_for_workers(cluster, worker_resources(cluster), timeout_s=timeout_s)

    nodes = wait(config)
    decided = config.model_copy(update={"use_gpu": uses_gpu(config)})
    # The nodes that came while `wait` asked for CPUs alone may have GPUs.
    return decided, wait(decided) if decided.use_gpu else nodes


def stop_training(
    request_stop: Callable[[], None], training: Future[bool], timeout_s: float = STOP_TIMEOUT_S
) -> None:
    """After Ctrl-C or a scheduler's SIGTERM: request a checkpoint, wait at most `timeout_s` for it,
    and tell the user if none was written."""
    tell("train: interrupted; writing a checkpoint (interrupt again to exit without one)")
    request_stop()
    done, _ = wait([training], timeout=timeout_s)
    if not done:
        why = f"no checkpoint within {timeout_s:.0f} s"
    elif training.exception() is not None or not training.result():
        why = "no checkpoint could be written"
    else:
        return
    tell(f"train: {why}; training resumes from an earlier one")


def report_training(index: CheckpointIndex, run_url: str, store_url: str) -> None:
    """Print the result in two lines, and the next command."""
    best = index.best
    auroc = "undefined" if best.val_auroc is None else f"{best.val_auroc:.3f}"
    print(f"best epoch {best.epoch}  val AUROC {auroc}  of {index.latest.epoch} epochs")
    print(f"run {run_url}")
    flags = shlex.join(["--store", store_url, "--run", run_url])
    tell(f"next: python -m jobs.evaluate {flags}")
