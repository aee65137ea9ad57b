"""The Ray session of a job: on the cluster of RAY_ADDRESS, or on a local one that it starts."""

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_logging

from jobs.ray_cluster.nodes import count_workers
from jobs.terminal.entry_point import tell
from jobs.terminal.ray_address import check_ray_address
from pneumo.config import ClusterConfig
from pneumo.errors import ClusterError

# OpenMP threads sleep while they wait: two DDP ranks that spin on two cores are ten times slower.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    # A process group with lost ranks cannot shut down properly: give up after 1 s, not 30 s.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    # A stopped trial may have a checkpoint to write. Tune would wait 2 s for it; the next trial in
    # the same process would then be dropped without a message, or hang.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "86400",
    # Ray itself writes a search's state to S3, with checksums that older servers (radosgw 16)
    # refuse with HTTP 411; this project's own writes have Content-MD5.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # jobs.training.recovery watches the nodes; Ray's watcher reacts too late.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # no tables of Tune: jobs.tuning.live_table shows the trials
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search like every other job
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **WORKER_ENVIRONMENT,
}


@contextmanager
def ray_session(*, show_logs: bool = False) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start a local one and stop it at the end.

    `show_logs` shows the output of the workers.
    """
    if ray.is_initialized():
        yield
        return
    check_ray_address()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _connect(os.environ.get("RAY_ADDRESS"), show_logs=show_logs)
    # Ray's own SIGTERM handler would abort the process, exit code 134.
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None, *, show_logs: bool) -> None:
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if not address:
        # The cluster ends with its job, so nobody would look at a dashboard; without one Ray starts
        # 2 s sooner, and eleven processes less take CPU from the job.
        options = {"num_cpus": count_cpus(), "include_dashboard": False}
        tell(f"ray: starting on this machine with {options['num_cpus']} CPUs")
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=show_logs,
            configure_logging=True,
            runtime_env={
                "env_vars": WORKER_ENVIRONMENT,
                "worker_process_setup_hook": "jobs.ray_cluster.worker_setup.configure_worker",
            },
            **options,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"ray: cannot connect to {address or 'a local cluster'}: {error}"
        ) from error
    # Otherwise Ray prints its errors to stdout; our messages say the same in one line. The public
    # setting, RAY_DEDUP_LOGS_SKIP_REGEX, is read when Ray is imported, before --debug is known.
    if not show_logs:
        ray_logging.stdout_deduplicator.skip_re = re.compile("")


def count_cpus(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The CPUs that this process may use, at least 2: where a scheduler or a container has limited
    it, fewer than the machine has. `limit` is the file of the container's limit."""
    # Linux only.
    allowed = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))(0)
    count = len(allowed)
    with suppress(OSError, ValueError):  # "max": no limit
        quota, period = limit.read_text().split()
        count = min(count, int(quota) // int(period))
    return max(count, 2)


def uses_gpu(config: ClusterConfig) -> bool:
    """Whether each worker gets a GPU; "auto" depends on the connected cluster."""
    if config.use_gpu == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) >= 1)
    return config.use_gpu


def worker_resources(config: ClusterConfig) -> dict[str, float]:
    """Resources that one worker reserves."""
    gpu = {"GPU": 1.0} if uses_gpu(config) else {}
    return {"CPU": float(config.cpus_per_worker), **gpu}


def start_timeout_s(config: ClusterConfig, num_workers: int) -> float:
    """How long to wait for the workers' resources, in seconds.

    A local cluster does not grow: it waits for resources in use, but not for missing ones.
    """
    if os.environ.get("RAY_ADDRESS"):
        return config.start_timeout_s
    has_room = count_workers(worker_resources(config)) >= num_workers
    return config.start_timeout_s if has_room else 0.0


def wait_for_resources(config: ClusterConfig, num_workers: int) -> None:
    """Wait until the nodes have room for the workers; an autoscaler may be adding nodes.

    Raises ClusterError after `start_timeout_s`; it gives the resources needed and present.
    """
    wanted = worker_resources(config)
    deadline_s = time.monotonic() + start_timeout_s(config, num_workers)
    while (fits := count_workers(wanted)) < num_workers:
        if time.monotonic() >= deadline_s:
            total = ray.cluster_resources()
            needs = ", ".join(
                f"{each * num_workers:g} {name} (it has {total.get(name, 0):g})"
                for name, each in wanted.items()
            )
            who = "1 worker needs" if num_workers == 1 else f"{num_workers} workers need"
            change = "lower --tune.workers-per-trial" if fits else "lower --cluster.cpus-per-worker"
            if total.get("GPU", 0) < wanted.get("GPU", 0):
                change = "set --cluster.use-gpu false"
            raise ClusterError(
                f"cluster: {who} {needs}, and its nodes have room for {fits}; {change} or add nodes"
            )
        time.sleep(1.0)
