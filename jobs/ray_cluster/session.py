"""The Ray cluster that a job runs on: the one it was submitted to, or one of its own on this
machine."""

import logging
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_logging

from jobs.terminal.entry_point import tell
from pneumo.config import ClusterConfig
from pneumo.errors import ClusterError, ConfigError

# One thread a worker, and threads that sleep while they wait: two DDP ranks that spin on two cores
# are ten times slower.
WORKER_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    # Workers whose peers are gone cannot say good-bye: they are ended after 1 s, not 30.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    # A trial that is stopped may have a checkpoint to write. Tune would wait 2 s for it, and then
    # give up the trial that comes next in its process, without a word, or wait for it for ever.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "86400",
    # Ray writes a search's state to S3 by itself, with checksums that older servers (radosgw 16)
    # refuse with HTTP 411; what this project writes has Content-MD5.
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}

_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # jobs.training.recovery watches the nodes; Ray's watcher would let a run go on too long.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's tables; jobs.tuning.live_table has its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a search as it ends every job
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **WORKER_ENVIRONMENT,
}


@contextmanager
def ray_session(*, show_logs: bool = False) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start one here and stop it at the end.

    `show_logs` lets the workers' own output through.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS={address}: jobs are submitted there: use `python -m cluster submit`"
        )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    _connect(address, show_logs=show_logs)
    # Ray's own handler would end the process in an abort, exit code 134.
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
        # Nobody looks at the dashboard of a cluster that ends with its job; without, it starts 2 s
        # sooner and has eleven processes less on the cores that compute.
        options = {"num_cpus": max(os.cpu_count() or 1, 2), "include_dashboard": False}
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
    # Ray prints its errors to stdout otherwise; ours say the same in one line. The public switch,
    # RAY_DEDUP_LOGS_SKIP_REGEX, is read when Ray is imported, before --debug is known.
    if not show_logs:
        ray_logging.stdout_deduplicator.skip_re = re.compile("")


def uses_gpu(config: ClusterConfig, there: Mapping[str, float] | None = None) -> bool:
    """Whether workers get a GPU each, of a cluster's resources; None: of those of this cluster."""
    if config.use_gpu == "auto":
        there = ray.cluster_resources() if there is None else there
        return there.get("GPU", 0) >= 1
    return config.use_gpu


def worker_resources(
    config: ClusterConfig, there: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What one worker reserves; `there` as for `uses_gpu`."""
    gpu = {"GPU": 1.0} if uses_gpu(config, there) else {}
    return {"CPU": float(config.cpus_per_worker), **gpu}


def resolve_use_gpu(config: ClusterConfig) -> ClusterConfig:
    """The same with `use_gpu` decided, once: a run that loses its only GPU waits for another, and
    does not go on without."""
    return config.model_copy(update={"use_gpu": uses_gpu(config)})


def start_timeout_s(config: ClusterConfig, num_workers: int) -> float:
    """How long waiting for the resources of the workers makes sense, in seconds.

    A cluster of our own does not grow: what it lacks is not waited for, only what is in use.
    """
    if os.environ.get("RAY_ADDRESS"):
        return config.start_timeout_s
    there, wanted = ray.cluster_resources(), worker_resources(config)
    enough = all(there.get(name, 0) >= each * num_workers for name, each in wanted.items())
    return config.start_timeout_s if enough else 0.0


def wait_for_resources(config: ClusterConfig, num_workers: int) -> None:
    """Return once the cluster has what the workers need; it may be growing.

    Raises ClusterError after `start_timeout_s`, saying what was asked and what there is.
    """
    wanted = {name: value * num_workers for name, value in worker_resources(config).items()}
    deadline_s = time.monotonic() + start_timeout_s(config, num_workers)
    while True:
        there = ray.cluster_resources()
        missing = {k: v for k, v in wanted.items() if there.get(k, 0) < v}
        if not missing:
            return
        if time.monotonic() >= deadline_s:
            lacks = ", ".join(f"{v:g} {k} (it has {there.get(k, 0):g})" for k, v in missing.items())
            raise ClusterError(
                f"cluster: {num_workers} workers need {lacks}; lower --cluster.num-workers or add "
                "nodes"
            )
        time.sleep(min(1.0, math.ceil(deadline_s - time.monotonic())))
