"""The result of a search: its trials, the chosen setting, and the files with them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from pneumo.config import Config, without_folders
from pneumo.config_layers import override
from pneumo.dataset.study_table import encode_parquet
from pneumo.search_space import Scalar
from pneumo.tuning.choice import SettingChoice
from pneumo.tuning.trials import Trial, sort_trials


@dataclass(frozen=True)
class Search:
    """A completed search."""

    name: str
    config: Config
    manifest_digest: str
    trials: tuple[Trial, ...]
    """In the order of `sort_trials`."""
    choice: SettingChoice
    confirmed: tuple[Trial, ...] = ()
    """The trials of confirmation, each named after its setting's trial."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Fraction of the objective's variance explained by each key; empty where unknown."""

    @property
    def warning(self) -> str | None:
        """Why the result is doubtful, or None."""
        trained = [trial for trial in (*self.trials, *self.confirmed) if trial.epochs]
        random = sum(trial.fell_back for trial in trained)
        if not random:
            return None
        weights = self.config.model.weights
        if random == len(trained):
            return (
                f"model.weights {weights} was not available: all trials started from random "
                "weights, and the result is valid for these alone"
            )
        return (
            f"model.weights was not available everywhere: {random} of {len(trained)} trials "
            "started from random weights, and cannot be compared with the others"
        )

    @property
    def epochs(self) -> int:
        """Epochs of all trials, without confirmation."""
        return sum(trial.epochs for trial in self.trials)


def make_recipe(config: Config, settings: Mapping[str, Scalar]) -> dict[str, Any]:
    """The search's configuration with `settings`, as differences from the defaults."""
    sections = {"seed", "data", "augment", "model", "train"}
    chosen = override(config, settings)
    return chosen.model_dump(mode="json", include=sections, exclude_defaults=True)


def to_parquet(search: Search) -> bytes:
    """trials.parquet: a row per trial, best first, then a row per trial of confirmation.

    `name`, `role` (search or confirm), `state`, `seed`, `chosen`, `objective` with `low` and
    `high`, `epochs`, `seconds`, `error`, the last epoch's metrics, and each searched key (of a
    file its name alone).
    """
    config = search.config.tune
    rows = [
        *(_row(trial, "search", search) for trial in sort_trials(search.trials, config)),
        *(_row(trial, "confirm", search) for trial in search.confirmed),
    ]
    table = _to_columns(rows).replace_schema_metadata(
        {
            "pneumo.choice": json.dumps(
                {
                    "trial": search.choice.trial.name,
                    "best": search.choice.best.name,
                    "ties": search.choice.ties,
                    "reason": search.choice.reason,
                    "confirmations": [asdict(one) for one in search.choice.confirmations],
                }
            )
        }
    )
    return encode_parquet(table)


def _row(trial: Trial, role: str, search: Search) -> dict[str, Any]:
    config = search.config.tune
    interval = trial.interval(config)
    last = trial.history[-1] if trial.history else {}
    return {
        "name": trial.name,
        "role": role,
        "state": trial.state,
        "seed": trial.seed,
        "chosen": role == "search" and trial.name == search.choice.trial.name,
        "objective": trial.objective(config),
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
        "epochs": trial.epochs,
        "seconds": trial.seconds,
        "error": trial.error,
        **{f"last {name}": last.get(name) for name in ("val/auroc", "val/loss", "train/loss")},
        **{key: without_folders(value) for key, value in trial.settings.items()},
    }


def _to_columns(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A key with both numbers and texts as values becomes text."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values, pa.float64() if float in kinds <= {int, float} else None)
    return pa.table(columns)
