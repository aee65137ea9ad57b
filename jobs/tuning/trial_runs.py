"""The trainable that Tune runs for each trial, its resources, and the data that all trials share.

A trial of one worker is a plain Tune function around `fit`, and its process is reused for the next
trial; a trial of several workers is a Ray Train run of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from jobs.ray_cluster.nodes import count_workers, workers_by_node
from jobs.ray_cluster.session import uses_gpu, worker_resources
from jobs.terminal.entry_point import find_cause, tell
from jobs.training.trainer import Training, build_trainer
from jobs.tuning.trial_judge import SharedTrialData, TrialJudge
from jobs.tuning.trial_records import drop_checkpoints, trial_config, trial_url
from pneumo.config import ClusterConfig, Config, DataConfig
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.study_table import read_studies
from pneumo.errors import DivergedError
from pneumo.loading.blocks import PreparedStore, input_size
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.loader import read_in_memory
from pneumo.loading.sample_order import World
from pneumo.training.callbacks import Callbacks

_DRIVER_MEMORY_BYTES = 200 * 2**20
_MEMORY_FRACTION = 0.5
"""Fraction of a node's object store for shared data; the rest is for Ray's own objects."""
_SHARED = ("train", "val")
"""The splits that trials share."""


def max_concurrent_trials(config: Config) -> int:
    """How many trials fit into the cluster with all their workers, so that none waits for ever."""
    fits = count_workers(worker_resources(config.cluster))
    return min(fits // config.tune.workers_per_trial, config.tune.trials)


def load_shared_data(config: Config, manifest: Manifest, store_url: str) -> SharedTrialData:
    """Read the data that every trial needs once into Ray's object store: the patients of val, and
    the splits where they fit."""
    val = manifest.splits["val"]
    studies = read_studies(store_url, manifest)
    patients = {key: row.patient for key, row in studies.items() if row.split == "val"}
    memory_bytes = _MEMORY_FRACTION * _smallest_object_store(config.cluster)
    splits: dict[int, Mapping[str, Any]] = {}
    for size in choose_shared_sizes(config, manifest, memory_bytes):
        splits[size] = _load_splits(config, manifest, store_url, size)
    if not splits or not all(splits.values()):
        tell(
            "tune: trials share no copy of the store, as its images are of many sizes, streamed, "
            "or more than half of Ray's object store; each trial reads it"
        )
    workers = config.tune.trials * config.tune.workers_per_trial
    return SharedTrialData(
        config.tune,
        val.positives / val.samples,
        manifest.image_size,
        ray.put(patients),
        splits,
        min(workers, max(workers_by_node(worker_resources(config.cluster)), default=1)),
    )


def choose_shared_sizes(config: Config, manifest: Manifest, memory_bytes: float) -> list[int]:
    """The image sizes of the trials whose splits fit together into `memory_bytes`; empty where
    sizes are drawn from a range."""
    domain = config.tune.space.get("data.image_size")
    values: Sequence[object] = [config.data.image_size] if domain is None else domain.values
    if domain is not None and domain.kind not in ("choice", "fixed"):
        return []
    sizes = {input_size(manifest, size) for size in values if isinstance(size, int | None)}
    num_samples = sum(manifest.splits[name].samples for name in _SHARED)
    chosen = []
    for size in sorted(sizes):
        memory_bytes -= num_samples * size**2
        if memory_bytes >= 0:
            chosen.append(size)
    return chosen


def _smallest_object_store(cluster: ClusterConfig) -> float:
    """The memory for Ray's objects, in bytes, of the node with the least on which a trial may
    run."""
    capacities = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cluster.cpus_per_worker
    ]
    return min(capacities, default=0.0)


def _load_splits(config: Config, manifest: Manifest, store_url: str, size: int) -> dict[str, Any]:
    """References to the splits at `size`; empty where they do not fit into a worker's memory."""
    # One after the other, with the CPUs of a worker: the trials have not started yet.
    read = ray.remote(num_cpus=config.cluster.cpus_per_worker, num_returns=2)(_read_split)
    splits = {}
    for name in _SHARED:
        fits, splits[name] = read.remote(store_url, manifest, name, config.data, size)
        if not ray.get(fits):
            return {}
    return splits


def _read_split(
    store_url: str, manifest: Manifest, split: str, config: DataConfig, image_size: int
) -> tuple[bool, InMemorySplit | None]:
    at_size = config.model_copy(update={"image_size": image_size})
    found = read_in_memory(PreparedStore(store_url, manifest, at_size), split)
    return found is not None, found


def make_trainable(config: Config, store_url: str, run_url: str, shared: SharedTrialData) -> Any:
    """The trainable that Tune runs for each trial, with its resources."""
    search = {"config": config, "store_url": store_url, "run_url": run_url, "shared": shared}
    trainable = ray.tune.with_parameters(_run_trial, **search)
    several = config.tune.workers_per_trial > 1
    # A trial of several workers only waits for them; its own CPU could block them for ever.
    resources = {"memory": _DRIVER_MEMORY_BYTES} if several else worker_resources(config.cluster)
    return ray.tune.with_resources(trainable, resources)


def _run_trial(
    trial: dict[str, Any], config: Config, store_url: str, run_url: str, shared: SharedTrialData
) -> None:
    """Train one trial, and report it to Tune."""
    url = trial_url(run_url, trial["name"])
    judge = TrialJudge(shared, url, World())
    result = judge.read_result()
    if result is not None:
        ray.tune.report(result)
        return
    training = Training(
        trial_config(config, trial["settings"], trial["seed"]), store_url, url, trial_context=shared
    )
    try:
        if config.tune.workers_per_trial > 1:
            callbacks = [TuneReportCallback()]
            build_trainer(training, training.config.cluster, callbacks=callbacks).fit()
        else:
            _fit_here(training, judge)
    except SystemExit:  # ASHA has stopped the trial at a rung
        drop_checkpoints(url)
        raise
    except Exception as error:  # Ray Train wraps a worker's exception
        cause = find_cause(error)
        if not isinstance(cause, DivergedError):
            raise
        ray.tune.report(judge.fail(cause))
    drop_checkpoints(url)


def _fit_here(training: Training, judge: TrialJudge) -> None:
    from pneumo.training.fit import fit  # takes 3 s of CPU, and the driver does not need it

    config = training.config
    torch.set_num_threads(config.cluster.cpus_per_worker)
    fit(
        config,
        store_url=training.store_url,
        run_url=training.run_url,
        world=World(),
        device=torch.device("cuda" if uses_gpu(config.cluster) else "cpu"),
        callbacks=judge.callbacks(Callbacks(), ray.tune.report),
        shared_splits=judge.shared.fetch_splits(config.data.image_size),
        trainings_here=judge.shared.trainings_beside(1),
    )
