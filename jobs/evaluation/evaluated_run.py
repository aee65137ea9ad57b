"""The run that is evaluated: its checkpoints, those of other runs of an ensemble, and the store."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.evaluation.ray_scoring import RunCheckpoint, ScoredStore, Scoring
from jobs.terminal.entry_point import tell
from pneumo import storage
from pneumo.command_line import EvaluateArguments
from pneumo.config import Config, EvaluateConfig, training_settings
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import RunError, StoreError
from pneumo.evaluation.file_predictions import FrozenRule
from pneumo.evaluation.predictions import Predictions
from pneumo.training.checkpoint_writer import read_history
from pneumo.training.checkpoints import (
    Checkpoint,
    CheckpointEntry,
    CheckpointIndex,
    load_checkpoint,
    read_index,
)

METRICS = "metrics.json"
PREDICTIONS = "predictions.parquet"
EVALUATIONS = "evaluations.jsonl"
"""Shows how often test was evaluated: choosing models by test's numbers makes them too good."""
EVALUATED_SPLITS = ("val", "test")


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """The checkpoints to score, and the store of their training."""

    run_url: str
    store_url: str
    manifest: Manifest
    checkpoint: Checkpoint
    """The first of those that are scored; Grad-CAM maps are made with it."""
    scored: ScoredStore
    history: Sequence[Mapping[str, float | None]]
    """Metrics of all epochs of the run, also of those after the checkpoint's."""
    differ_in: Sequence[str] = ()
    """Training settings that differ between the scored runs."""
    num_earlier: int = 0
    """How often the run was evaluated before."""

    @property
    def name(self) -> str:
        """The run's name."""
        return storage.last_part(self.run_url)

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each checkpoint."""
        return [checkpoint.entry.sha256 for checkpoint in self.scored.scoring.checkpoints]


def find_evaluated_run(arguments: EvaluateArguments, config: EvaluateConfig) -> EvaluatedRun:
    """The checkpoints to score, checked against the store.

    Raises RunError when a run is not trained, StoreError when it was trained on another store.
    """
    store_url, run_url = storage.normalise(arguments.store), storage.normalise(arguments.run)
    manifest = read_manifest(store_url)
    run_urls = [run_url, *(storage.normalise(url) for url in arguments.members)]
    if len(set(run_urls)) < len(run_urls):
        raise RunError("--members: a run is given twice; give each once")
    found = tuple(one for url in run_urls for one in find_checkpoints(url, config.ensemble))
    first = _load_trained_on(found[0], store_url, manifest)
    configs = [first.config]
    configs += [_load_trained_on(other, store_url, manifest).config for other in found[1:]]
    scored = ScoredStore(Scoring(found, views=config.tta or 1), store_url)
    history = _read_history(run_url, first)
    differ_in = find_differences(configs)
    return EvaluatedRun(run_url, store_url, manifest, first, scored, history, differ_in)


def find_differences(configs: Sequence[Config]) -> list[str]:
    """Training settings, such as `train.lr`, that are not the same in all."""
    trees = [training_settings(config) for config in configs]
    found = []
    for section, first in trees[0].items():
        if not isinstance(first, dict):
            found += [section] if any(tree[section] != first for tree in trees) else []
            continue
        for key, value in first.items():
            if any(tree[section][key] != value for tree in trees):
                found.append(f"{section}.{key}")
    return found


def find_checkpoints(run_url: str, ensemble: int | str) -> tuple[RunCheckpoint, ...]:
    """The run's best checkpoint, or its last `ensemble` checkpoints, newest first.

    Raises RunError where fewer are kept.
    """
    index = read_index(run_url)
    if not index.finished:
        tell(f"warning: {run_url}: training has not finished; evaluating its checkpoints so far")
    if isinstance(ensemble, str):
        return (RunCheckpoint(run_url, index.best),)
    last = _last_in_a_row(index)
    if len(last) < ensemble:
        raise RunError(
            f"{run_url}: of its last checkpoints {len(last)} are kept, not the {ensemble} of "
            "evaluate.ensemble; lower it, or train with a higher train.keep_checkpoints"
        )
    return tuple(RunCheckpoint(run_url, entry) for entry in last[:ensemble])


def _last_in_a_row(index: CheckpointIndex) -> list[CheckpointEntry]:
    """The checkpoints of the last consecutive epochs, newest first; an older best checkpoint is
    not among them."""
    found = [index.latest]
    for entry in reversed(index.entries[:-1]):
        if entry.epoch < found[-1].epoch - 1:
            break
        found.append(entry)
    return found


def _read_history(run_url: str, checkpoint: Checkpoint) -> Sequence[Mapping[str, float | None]]:
    """Of all epochs; only up to the checkpoint's where it was copied without its run."""
    try:
        return read_history(run_url)
    except FileNotFoundError:
        return checkpoint.history


def _load_trained_on(found: RunCheckpoint, store_url: str, manifest: Manifest) -> Checkpoint:
    checkpoint = load_checkpoint(found.run_url, found.entry)
    if checkpoint.manifest_digest != manifest.digest:
        raise StoreError(
            f"{store_url}: is not the store that {found.run_url} was trained on (manifest "
            f"{manifest.digest[:12]}, not {checkpoint.manifest_digest[:12]}); its test studies may "
            "be in that training set; to evaluate the run on it, give the store of its training as "
            "--store, and this one as --external"
        )
    return checkpoint


def read_other_predictions(run_url: str, studies: Mapping[str, StudyRow]) -> Predictions:
    """Another run's predictions. Raises RunError where it was evaluated on other studies."""
    other = read_predictions(run_url, "--compare-with")
    evaluated = {key for key, row in studies.items() if row.split in EVALUATED_SPLITS}
    if set(other.key.tolist()) != evaluated:
        raise RunError(
            f"--compare-with {run_url}: was evaluated on another store, or another split of it; "
            "evaluate both runs on one store"
        )
    return other


def read_predictions(run_url: str, flag: str) -> Predictions:
    """The predictions of the run that `flag` names. Raises RunError for those that are broken, or
    of an older version."""
    data = storage.read_bytes(storage.join(storage.normalise(run_url), PREDICTIONS))
    try:
        return Predictions.from_parquet(data)
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{flag} {run_url}: its {PREDICTIONS} is broken, or of an older version ({error}); "
            "evaluate the run again with --overwrite"
        ) from error


def find_metrics(run_url: str) -> dict[str, Any] | None:
    """The run's metrics.json; None of a run that is not evaluated. Raises RunError for no JSON."""
    text = storage.find_text(storage.join(run_url, METRICS))
    return None if text is None else parse_metrics(run_url, text)


def parse_metrics(run_url: str, text: str) -> dict[str, Any]:
    """The content `text` of the run's metrics.json. Raises RunError for no JSON."""
    try:
        metrics: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise RunError(f"{run_url}/{METRICS}: no JSON; evaluate the run again") from error
    return metrics


def find_evaluated_checkpoints(
    run_urls: Sequence[str], rule: FrozenRule
) -> tuple[RunCheckpoint, ...]:
    """The checkpoints whose logits gave the threshold and the calibration of `rule`; of runs that
    are not evaluated, the best.

    Raises RunError when a checkpoint belongs to none of the runs, or a run has none of them.
    """
    if rule.checkpoints is None:
        return tuple(RunCheckpoint(url, read_index(url).best) for url in run_urls)
    there = {
        entry.sha256: RunCheckpoint(url, entry)
        for url in run_urls
        for entry in read_index(url).entries
    }
    if missing := sum(digest not in there for digest in rule.checkpoints):
        raise RunError(
            f"{run_urls[0]}: {missing} of the {len(rule.checkpoints)} checkpoints that were "
            "evaluated are not there; name the ensemble's other runs with --members, or evaluate "
            "again"
        )
    found = tuple(there[digest] for digest in rule.checkpoints)
    if idle := set(run_urls) - {one.run_url for one in found}:
        raise RunError(
            f"--members: {', '.join(sorted(idle))} was not evaluated with {run_urls[0]}; "
            "leave it out, or evaluate the ensemble first"
        )
    return found
