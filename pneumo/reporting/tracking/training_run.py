"""What W&B gets of a training, read from its files."""

from collections.abc import Mapping, Sequence

from pneumo.reporting.tracking import artifacts, tracked_run
from pneumo.reporting.tracking.tracked_run import TrackedRun
from pneumo.training.checkpoint_writer import read_history
from pneumo.training.checkpoints import CheckpointIndex, find_index

_OF_TRAINING = ("lr", "grad_norm")


def read_training(run_url: str) -> TrackedRun | None:
    """The training in the run's folder so far; None before its first checkpoint.

    Raises TrackingError, CheckpointError or StorageError where the folder cannot be read.
    """
    config, index = tracked_run.read_config(run_url), find_index(run_url)
    if config is None or index is None:
        return None
    name, manifest = tracked_run.make_run_id(run_url), tracked_run.read_dataset(run_url)
    digest = None if manifest is None else manifest.digest
    record = artifacts.record_checkpoint(run_url, index.best, digest)
    history = [name_metrics(metrics) for metrics in read_history(run_url)]
    return TrackedRun(
        id=name,
        name=name,
        group=config.tracking.group or name,
        job_type="train",
        tracking=config.tracking,
        config={**config.without_paths(), **tracked_run.describe_store(manifest)},
        history=history,
        summary=_summarise(history, index),
        inputs=[] if manifest is None else [artifacts.describe_dataset(manifest)],
        outputs=[artifacts.describe_checkpoint(record, ["best"])] if index.finished else [],
        is_finished=index.finished,
    )


def _summarise(
    history: Sequence[Mapping[str, float]], index: CheckpointIndex
) -> dict[str, float | int]:
    """The metrics of the scored epoch; those of speed are of the last epoch."""
    scored = next((row for row in history if row["epoch"] == index.best.epoch), {})
    speed = {k: v for row in history[-1:] for k, v in row.items() if k.startswith("perf/")}
    found = {k: v for k, v in scored.items() if k != "epoch" and not k.startswith("perf/")}
    return {**speed, **found, "train/best_epoch": index.best.epoch}


def name_metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """An epoch's line of metrics.jsonl under W&B's names: a metric without prefix is one of
    training (`train/lr`) or of its speed (`perf/images_per_s`). `data/` and None are left out."""
    return tracked_run.drop_none(
        {
            name
            if "/" in name or name == "epoch"
            else f"{'train' if name in _OF_TRAINING else 'perf'}/{name}": value
            for name, value in metrics.items()
            if not name.startswith("data/")
        }
    )
