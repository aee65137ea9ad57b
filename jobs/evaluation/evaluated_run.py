"""What is evaluated: checkpoints of a run, and of others, on the store of their training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.evaluation.ray_scoring import Scored, Scoring, Weights
from jobs.terminal.entry_point import tell
from pneumo import storage
from pneumo.command_line import EvaluateArguments
from pneumo.config import TRAINING_SECTIONS, Config, EvaluateConfig
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
"""Who chooses by test's numbers after many looks at them makes them too good."""
EVALUATED_SPLITS = ("val", "test")


@dataclass(frozen=True, eq=False)
class Subject:
    """Checkpoints and the store."""

    run_url: str
    store_url: str
    manifest: Manifest
    checkpoint: Checkpoint
    """The first of those that are scored: its maps are shown."""
    scored: Scored
    history: Sequence[Mapping[str, float | None]]
    """Metrics of all epochs of the run, those after the checkpoint's included."""
    differ_in: Sequence[str] = ()
    """Settings of the training that are not the same in all runs that are scored."""
    earlier: str = ""
    """A line of EVALUATIONS for each time that the run was evaluated before."""

    @property
    def name(self) -> str:
        """The run's."""
        return name_run(self.run_url)

    @property
    def num_earlier(self) -> int:
        """How often the run was evaluated before."""
        return len(self.earlier.splitlines())

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each checkpoint."""
        return [weights.entry.sha256 for weights in self.scored.scoring.weights]


def name_run(run_url: str) -> str:
    """The last part of its URL."""
    return storage.normalise(run_url).rsplit("/", 1)[-1]


def find_subject(arguments: EvaluateArguments, config: EvaluateConfig) -> Subject:
    """The checkpoints that are to be scored, checked against the store.

    Raises RunError when a run is not trained, StoreError when the store is not the one that it was
    trained on.
    """
    store_url, run_url = storage.normalise(arguments.store), storage.normalise(arguments.run)
    manifest = read_manifest(store_url)
    run_urls = [run_url, *(storage.normalise(url) for url in arguments.members)]
    if len(set(run_urls)) < len(run_urls):
        raise RunError("--members: a run is named twice; each counts once")
    weights = tuple(found for url in run_urls for found in find_weights(url, config.ensemble))
    first = _load_trained_on(weights[0], store_url, manifest)
    configs = [first.config]
    configs += [_load_trained_on(other, store_url, manifest).config for other in weights[1:]]
    scored = Scored(Scoring(weights, views=config.tta or 1), store_url)
    history = _read_history(run_url, first)
    differ_in, earlier = find_differences(configs), _read_earlier(run_url)
    return Subject(run_url, store_url, manifest, first, scored, history, differ_in, earlier)


def find_differences(configs: Sequence[Config]) -> list[str]:
    """Settings of the training, such as `train.lr`, that are not the same in all."""
    trees = [config.model_dump(mode="json", include=set(TRAINING_SECTIONS)) for config in configs]
    found = []
    for section, first in trees[0].items():
        if not isinstance(first, dict):
            found += [section] if any(tree[section] != first for tree in trees) else []
            continue
        for key, value in first.items():
            if any(tree[section][key] != value for tree in trees):
                found.append(f"{section}.{key}")
    return found


def find_weights(run_url: str, ensemble: int | str) -> tuple[Weights, ...]:
    """The run's best checkpoint, or its last so many, newest first.

    Raises RunError where there are fewer.
    """
    index = read_index(run_url)
    if not index.finished:
        tell(f"warning: {run_url} is not trained to its end; evaluating what there is so far")
    if isinstance(ensemble, str):
        return (Weights(run_url, index.best),)
    last = _last_in_a_row(index)
    if len(last) < ensemble:
        raise RunError(
            f"{run_url}: of its last checkpoints {len(last)} are kept, not the {ensemble} of "
            "evaluate.ensemble; lower it, or train with a higher train.keep_checkpoints"
        )
    return tuple(Weights(run_url, entry) for entry in last[:ensemble])


def _last_in_a_row(index: CheckpointIndex) -> list[CheckpointEntry]:
    """The last checkpoints, newest first; the best, kept from long before them, is none of them."""
    found = [index.latest]
    for entry in reversed(index.entries[:-1]):
        if entry.epoch < found[-1].epoch - 1:
            break
        found.append(entry)
    return found


def _read_history(run_url: str, checkpoint: Checkpoint) -> Sequence[Mapping[str, float | None]]:
    """Of all epochs; of those up to the checkpoint where it was copied without its run."""
    try:
        return read_history(run_url)
    except FileNotFoundError:
        return checkpoint.history


def _read_earlier(run_url: str) -> str:
    try:
        return storage.read_text(storage.join(run_url, EVALUATIONS))
    except FileNotFoundError:
        return ""


def _load_trained_on(weights: Weights, store_url: str, manifest: Manifest) -> Checkpoint:
    checkpoint = load_checkpoint(weights.run_url, weights.entry)
    if checkpoint.manifest_digest != manifest.digest:
        raise StoreError(
            f"{store_url}: is not the store that {weights.run_url} was trained on (manifest "
            f"{manifest.digest[:12]}, not {checkpoint.manifest_digest[:12]}); its test studies may "
            "be in that training set; to judge the run there, give the store of its training as "
            "--store, and this one as --external"
        )
    return checkpoint


def read_other(run_url: str, studies: Mapping[str, StudyRow]) -> Predictions:
    """What another run said. Raises RunError where it is not evaluated, or on other studies."""
    url = storage.join(storage.normalise(run_url), PREDICTIONS)
    try:
        other = Predictions.from_parquet(storage.read_bytes(url))
    except KeyError as error:
        raise RunError(
            f"--compare-with {run_url}: its {PREDICTIONS} has no column {error}: an older version "
            "wrote it; evaluate it again with --overwrite"
        ) from error
    judged = {key for key, row in studies.items() if row.split in EVALUATED_SPLITS}
    if set(other.key.tolist()) != judged:
        raise RunError(
            f"--compare-with {run_url}: was evaluated on another store, or another split of it; "
            "evaluate both runs on one store"
        )
    return other


def find_evaluated(run_urls: Sequence[str], rule: FrozenRule) -> tuple[Weights, ...]:
    """The checkpoints that were evaluated, as threshold and calibration belong to their logits;
    of runs that are not evaluated the best.

    Raises RunError when one is not among the runs, or a run has none of them.
    """
    if rule.checkpoints is None:
        return tuple(Weights(url, read_index(url).best) for url in run_urls)
    there = {
        entry.sha256: Weights(url, entry) for url in run_urls for entry in read_index(url).entries
    }
    if missing := sum(digest not in there for digest in rule.checkpoints):
        raise RunError(
            f"{run_urls[0]}: {missing} of the {len(rule.checkpoints)} checkpoints that were "
            "evaluated are not there; name the ensemble's other runs with --members, or evaluate "
            "again"
        )
    weights = tuple(there[digest] for digest in rule.checkpoints)
    if idle := set(run_urls) - {found.run_url for found in weights}:
        raise RunError(
            f"--members: {', '.join(sorted(idle))} was no part of what {run_urls[0]} was evaluated "
            "as; leave it out, or evaluate the ensemble first"
        )
    return weights
