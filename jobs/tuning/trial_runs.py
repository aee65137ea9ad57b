"""What Tune runs for each trial, the resources that it reserves, and what all of them share.

A trial of one worker is a plain Tune function around `fit`, whose process is used for the next one;
a trial of several is a Ray Train run of its own.
"""

from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from jobs.ray_cluster.session import uses_gpu, worker_resources
from jobs.terminal.entry_point import find_cause
from jobs.training.trainer import Training, build_trainer
from jobs.tuning.trial_judge import SharedTrialData, TrialJudge
from jobs.tuning.trial_records import drop_checkpoints, trial_config, trial_url
from pneumo.config import Config, DataConfig
from pneumo.dataset.manifest import Manifest
from pneumo.dataset.study_table import read_studies
from pneumo.errors import ClusterError, DivergedError
from pneumo.loading.blocks import PreparedStore, input_size
from pneumo.loading.in_memory import InMemorySplit
from pneumo.loading.loader import read_in_memory
from pneumo.loading.sample_order import World
from pneumo.training.callbacks import Callbacks

_DRIVER_MEMORY_BYTES = 200 * 2**20
_MEMORY_FRACTION = 0.5
"""Of a node's object store: the rest is for what Ray itself passes around."""


def trials_at_once(config: Config, resources: Mapping[str, float]) -> int:
    """How many trials fit into the cluster with all their workers, so that none waits for ever.

    Raises ClusterError when not one fits.
    """
    workers = config.tune.workers_per_trial
    wanted = worker_resources(config.cluster, resources)
    fits = min(int(resources.get(name, 0) // (value * workers)) for name, value in wanted.items())
    if fits < 1:
        asked = ", ".join(f"{value * workers:g} {name}" for name, value in wanted.items())
        there = ", ".join(f"{resources.get(name, 0):g} {name}" for name in wanted)
        raise ClusterError(
            f"tune: a trial of {workers} workers needs {asked}, the cluster has {there}; lower "
            "--tune.workers-per-trial or add nodes"
        )
    return min(fits, config.tune.trials)


def load_shared_data(config: Config, manifest: Manifest, store_url: str) -> SharedTrialData:
    """Read once what every trial needs, into the memory of the nodes: the patients of val, and the
    splits where they fit there."""
    val = manifest.splits["val"]
    studies = read_studies(store_url, manifest)
    patients = {key: row.patient for key, row in studies.items() if row.split == "val"}
    return SharedTrialData(
        config.tune,
        val.positives / val.samples,
        manifest.image_size,
        ray.put(patients),
        {
            size: _load_splits(config, manifest, store_url, size)
            for size in _sizes(config, manifest)
        },
    )


def _sizes(config: Config, manifest: Manifest) -> list[int]:
    """The image sizes that trials will train at; none where they are drawn from a range."""
    domain = config.tune.space.get("data.image_size")
    if domain is None:
        return [input_size(manifest, config.data.image_size)]
    if domain.kind not in ("choice", "fixed"):
        return []
    return [input_size(manifest, size) for size in domain.values if isinstance(size, int | None)]


def _load_splits(config: Config, manifest: Manifest, store_url: str, size: int) -> dict[str, Any]:
    """References to the splits at `size`; none where a node could not hold them."""
    names = ("train", "val")
    room = [
        node["Resources"].get("object_store_memory", 0.0)
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= config.cluster.cpus_per_worker
    ]
    wanted = sum(manifest.splits[name].samples for name in names) * size**2
    if wanted > _MEMORY_FRACTION * min(room, default=0.0):
        return {}
    # In turns, with a worker's CPUs: trials start only after it.
    read = ray.remote(num_cpus=config.cluster.cpus_per_worker, num_returns=2)(_read_split)
    splits = {}
    for name in names:
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
    """What Tune runs for each trial, with the resources that it reserves."""
    search = {"config": config, "store_url": store_url, "run_url": run_url, "shared": shared}
    trainable = ray.tune.with_parameters(_run_trial, **search)
    several = config.tune.workers_per_trial > 1
    # The trial of several workers only waits for them; a CPU for it could starve them for ever.
    resources = {"memory": _DRIVER_MEMORY_BYTES} if several else worker_resources(config.cluster)
    return ray.tune.with_resources(trainable, resources)


def _run_trial(
    drawn: dict[str, Any], config: Config, store_url: str, run_url: str, shared: SharedTrialData
) -> None:
    """Train, and tell Tune what became of it."""
    url = trial_url(run_url, drawn["name"])
    judge = TrialJudge(shared, url, World())
    known = judge.recall()
    if known is not None:
        ray.tune.report(known)
        return
    training = Training(
        trial_config(config, drawn["settings"], drawn["seed"]), store_url, url, trial_context=shared
    )
    try:
        if config.tune.workers_per_trial > 1:
            callbacks = [TuneReportCallback()]
            build_trainer(training, training.config.cluster, callbacks=callbacks).fit()
        else:
            _fit_here(training, judge)
    except SystemExit:  # stopped at a rung, for good
        drop_checkpoints(url)
        raise
    except Exception as error:  # whatever Ray Train wraps around a worker's exception
        cause = find_cause(error)
        if not isinstance(cause, DivergedError):
            raise
        ray.tune.report(judge.fail(cause))
    drop_checkpoints(url)


def _fit_here(training: Training, judge: TrialJudge) -> None:
    from pneumo.training.fit import fit  # 3 s of CPU, which the driver does not need

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
    )
