"""The records of a search's trials, in the search's folder: a search that is started again, on
whatever cluster, resumes from them.

    trials/t007/trial.json       its settings and seed; written before the trial starts
                start.json       where its weights came from; written once they are loaded
                metrics.jsonl    its epochs; written before each is reported to Tune
                val.parquet      its logits on val after the last epoch
                end.json         how it ended; written last
"""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pneumo import storage
from pneumo.config import Config, TuneConfig, without_folders
from pneumo.config_layers import override
from pneumo.dataset.study_table import encode_parquet
from pneumo.network.backbones import Initialisation
from pneumo.network.scoring import Scores
from pneumo.search_space import Scalar
from pneumo.training import checkpoint_writer
from pneumo.tuning.objective import ObjectiveEstimate, estimate_objective
from pneumo.tuning.trials import History, State, Trial

_BEGUN, _STARTED, _SCORES, _ENDED = "trial.json", "start.json", "val.parquet", "end.json"
_UNFINISHED = '{"state": "unfinished", "error": null}'
_PATH = re.compile(r"""(?<!\w)(\w[\w+.-]*://|~?/(?=\S))((:(?=\S)|[^:"'])*/)?(:(?=\S)|[^\s:"'])*""")
"""A path or URL in a message; up to the last slash before a colon, as folders may have spaces."""
_ADDRESS = re.compile(r"\b\d{1,3}(\.\d{1,3}){3}(:\d+)?\b")
"""A node's address in a message of Ray's."""


def trial_url(run_url: str, name: str) -> str:
    """A trial's folder."""
    return storage.join(run_url, "trials", name)


def trial_config(config: Config, settings: Mapping[str, Any], seed: int | None = None) -> Config:
    """The configuration of one trial: shorter, and with its settings; `seed` None: the search's.

    The length of a run and the checkpoints to keep apply to the training with best.toml only.
    """
    changes = {
        "seed": config.seed if seed is None else seed,
        "train.epochs": config.tune.epochs,
        "train.patience": None,
        "train.keep_checkpoints": 1,
        "cluster.num_workers": config.tune.workers_per_trial,
        **settings,
    }
    return override(config, changes)


def write_begun(run_url: str, name: str, settings: Mapping[str, Scalar], seed: int) -> None:
    """Record that a trial with these settings begins."""
    _write(trial_url(run_url, name), _BEGUN, settings=dict(settings), seed=seed)


def write_started(url: str, initialisation: Initialisation) -> None:
    """Record in the trial's folder where its weights came from."""
    _write(url, _STARTED, weights=initialisation.source, fell_back=initialisation.fell_back)


def write_scores(url: str, scores: Scores, patients: Mapping[str, str]) -> None:
    """Write key, patient, target and logit of each study of val."""
    table = pa.table(
        {
            "key": scores.keys,
            "patient": [patients[key] for key in scores.keys],
            "target": scores.targets,
            "logit": scores.logits,
        }
    )
    storage.write_bytes(storage.join(url, _SCORES), encode_parquet(table))


def write_ended(run_url: str, name: str, state: State, error: str | None) -> None:
    """Record how a trial ended."""
    _write(trial_url(run_url, name), _ENDED, state=state, error=error)


def read_history(url: str) -> History:
    """Metrics of the trial's epochs, in order; empty where there are none yet."""
    try:
        return checkpoint_writer.read_history(url)
    except FileNotFoundError:
        return ()


def read_trial(run_url: str, name: str) -> Trial:
    """The record of a trial; its error, which is sent to W&B, names files without folders, and no
    node's address.

    Raises FileNotFoundError where it has not begun.
    """
    url = trial_url(run_url, name)
    begun = json.loads(storage.read_text(storage.join(url, _BEGUN)))
    ended = json.loads(storage.find_text(storage.join(url, _ENDED)) or _UNFINISHED)
    error = ended["error"] and _PATH.sub(lambda found: without_folders(found[0]), ended["error"])
    error = error and _ADDRESS.sub("(address)", error)
    started = json.loads(storage.find_text(storage.join(url, _STARTED)) or "{}")
    return Trial(
        name,
        begun["settings"],
        begun["seed"],
        history=read_history(url),
        fell_back=started.get("fell_back", False),
        state=ended["state"],
        error=error,
    )


def read_trials(run_url: str) -> dict[str, Trial]:
    """All trials that have begun, by name."""
    return {name: read_trial(run_url, name) for name in _list_with(run_url, _BEGUN)}


def list_ended(run_url: str) -> list[str]:
    """Names of the trials that have ended, sorted."""
    return _list_with(run_url, _ENDED)


def _list_with(run_url: str, file: str) -> list[str]:
    """Names of the trials whose folder holds `file`, sorted; other entries are ignored."""
    found = storage.list_urls(storage.join(run_url, "trials"))
    folders = [url.removesuffix(f"/{file}") for url in found if url.endswith(f"/{file}")]
    names = [folder.rpartition("/trials/")[2] for folder in folders]
    return sorted(name for name in names if "/" not in name and name != "..")


def read_estimate(url: str, config: TuneConfig) -> ObjectiveEstimate | None:
    """The objective after the last epoch, computed again; None before all epochs are trained."""
    try:
        data = storage.read_bytes(storage.join(url, _SCORES))
    except FileNotFoundError:
        return None
    table = pq.read_table(io.BytesIO(data))
    target, logit, patient = (table[name].to_numpy() for name in ("target", "logit", "patient"))
    return estimate_objective(target, logit, patient, config)


def drop_checkpoints(url: str) -> None:
    """Remove the checkpoints of an ended trial: a search's result is the recipe."""
    storage.remove_below(storage.join(url, "checkpoints"))


def _write(url: str, name: str, **facts: Any) -> None:
    storage.write_text(storage.join(url, name), f"{json.dumps(facts)}\n")
