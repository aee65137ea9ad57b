"""The arguments of the jobs, and what their command lines add up to.

What a job reads and writes (`--store`, `--run`) is no configuration: it does not change the digest.
The docstring under a field is its line in `--help`.
"""

import argparse
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, get_origin

from pydantic import Field, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, CliToggleFlag, SettingsError

from pneumo import storage
from pneumo.config import ClusterConfig, Config, Section
from pneumo.config_layers import (
    ENVIRONMENT_PREFIX,
    check_space,
    list_settings,
    read_environment,
    read_recipe,
    suggest,
    validate,
)
from pneumo.errors import ConfigError
from pneumo.search_space import flatten

_Text = Annotated[str, Field(min_length=1)]


class Arguments(Section):
    """What every job takes besides the configuration."""

    recipe: _Text | None = None
    """A recipe's name (`fast`) or a TOML file: settings that differ from the defaults."""
    debug: CliToggleFlag[bool] = False
    """Show the traceback of an error."""


class PrepareArguments(Arguments):
    """Prepare a store of shards from a folder of chest X-rays."""

    source: _Text
    """The data set's folder: RSNA, NIH, CheXpert, VinDr-CXR, chest_xray, or studies.csv with
    pictures."""
    store: _Text
    """Where the shards go: a folder or s3:// URL."""


class TrainArguments(Arguments):
    """Train one model on a prepared store."""

    store: list[_Text] = Field(min_length=1)
    """A prepared store: a folder or s3:// URL. Several, `--store A,B`, are joined in the run."""
    balanced: CliToggleFlag[bool] = False
    """Of several stores, train on equally many studies of each: a random subset of the larger
    ones'."""
    run: _Text | None = None
    """Where the run is written; none: runs/<job>-<time>. The URL of an unfinished run resumes
    it."""


class TuneArguments(TrainArguments):
    """Search for the best training settings."""


class EvaluateArguments(Arguments):
    """Evaluate a trained run on val and test."""

    store: _Text
    """A prepared store: a folder or s3:// URL."""
    run: _Text
    """The run to evaluate; its best checkpoint is scored and the results are written into it."""
    members: list[_Text] = Field(default=[])
    """More runs, trained on the same store, whose logits are averaged with the run's:
    `--members RUN2,RUN3`."""
    overwrite: CliToggleFlag[bool] = False
    """Evaluate a run again that has been evaluated."""
    compare_with: _Text | None = None
    """Another run, evaluated on the same studies, to compare with; with --external, one whose
    matrix of results on other sets is shown with this one's."""
    external: list[_Text] = Field(default=[])
    """Stores of other data sets, on which the run is evaluated with its own thresholds and
    calibration: `--external STORE2,STORE3`. --store is that of the training; its patients are left
    out."""


class PredictArguments(Arguments):
    """Score a folder of pictures with a trained run."""

    source: _Text
    """A folder or s3:// URL with DICOM, .dcm.gz, PNG, JPEG, TIFF or zip files at any depth; one
    such file; a DICOMDIR; or -: files named on standard input, one a line."""
    run: _Text
    """A trained run; if it was evaluated, its threshold and calibration are used."""
    output: _Text
    """Where predictions.csv, predictions.parquet and overlays/ go: a folder or s3:// URL."""
    members: list[_Text] = Field(default=[])
    """The other runs of the ensemble that was evaluated: `--members RUN2,RUN3`."""
    overwrite: CliToggleFlag[bool] = False
    """Replace what an earlier prediction left in the output."""
    no_overlays: CliToggleFlag[bool] = False
    """Write no picture of each image beside its Grad-CAM."""


class ExportArguments(Arguments):
    """Export an evaluated run to a folder that scores DICOM files without pneumo."""

    run: _Text
    """An evaluated run, whose threshold and calibration are exported with the model."""
    output: _Text
    """Where the model's folder goes: a folder or s3:// URL."""
    members: list[_Text] = Field(default=[])
    """The other runs of the ensemble that was evaluated: `--members RUN2,RUN3`."""
    overwrite: CliToggleFlag[bool] = False
    """Replace what an earlier export left in the output."""


class TrackArguments(Arguments):
    """Send a run to W&B from its folder."""

    run: _Text
    """The run or search to send to W&B."""
    anew: CliToggleFlag[bool] = False
    """Send it as new W&B runs; for runs that were deleted there, as W&B takes no id twice."""


@dataclass(frozen=True)
class Job:
    """A job's module, its arguments, and the sections of the configuration that it uses."""

    module: str
    arguments: type[Arguments]
    sections: tuple[str, ...]


_FAR_REACHING = ("tracking.entity", "tracking.project", "model.weights", "split.list")
"""Settings that say where results go, and which files are read."""
_TRAINING = ("seed", "data", "augment", "model", "train", "cluster", "tracking")
JOBS: Mapping[str, Job] = {
    "prepare": Job("jobs.prepare", PrepareArguments, ("seed", "prepare", "split")),
    "train": Job("jobs.train", TrainArguments, _TRAINING),
    "tune": Job("jobs.tune", TuneArguments, (*_TRAINING, "tune")),
    "evaluate": Job(
        "jobs.evaluate", EvaluateArguments, ("seed", "evaluate", "cluster", "tracking")
    ),
    "predict": Job("jobs.predict", PredictArguments, ("cluster",)),
    "export": Job("jobs.export", ExportArguments, ()),
    "track": Job("jobs.track", TrackArguments, ("tracking",)),
}


@dataclass(frozen=True)
class Invocation:
    """A job with its arguments and configuration, checked."""

    job: str
    arguments: Arguments
    config: Config
    warnings: tuple[str, ...] = ()
    """What the person should know before anything starts."""


def parse_command_line(
    job: str, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> Invocation:
    """The invocation that the layers add up to.

    Raises ConfigError for anything unknown or not allowed. `--help` prints and exits 0.
    """
    spec = JOBS[job]
    flags = _read_flags(spec, argv)
    given = {k: flags.pop(k) for k in list(flags) if k in spec.arguments.model_fields}
    layers = [
        ("the environment", read_environment(os.environ if environ is None else environ)),
        ("the command line", flags),
    ]
    warnings: tuple[str, ...] = ()
    if (recipe := given.get("recipe")) is not None:
        settings = read_recipe(str(recipe))
        layers.insert(0, (f"recipe {recipe}", settings))
        warnings = _warn_of_recipe(str(recipe), settings)
    config = validate(Config, layers)
    if job == "tune":
        check_space(config)
        warnings += _warn_of_searched(config, flags)
    if job != "train" and config.cluster.min_workers is not None:
        raise ConfigError(f"cluster.min_workers: {job} is not elastic, only train is; leave it out")
    if job == "tune" and config.cluster.num_workers != ClusterConfig().num_workers:
        raise ConfigError(
            "cluster.num_workers: a search uses all workers of the cluster; set "
            "tune.workers_per_trial for the workers of a trial"
        )
    arguments = validate(spec.arguments, [("the command line", given)])
    return Invocation(job, arguments, config, warnings)


def _warn_of_recipe(recipe: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a recipe from elsewhere has this machine read or send."""
    if storage.is_local(recipe):
        return ()
    found = {key: value for key, value in flatten(settings).items() if key in _FAR_REACHING}
    return tuple(f"recipe {recipe}: it sets {key} = {value}" for key, value in found.items())


def _warn_of_searched(config: Config, flags: Mapping[str, Any]) -> tuple[str, ...]:
    """The flags whose value no trial uses; a cluster's submission adds that of the weights."""
    unused = sorted((flatten(flags).keys() & config.tune.space.keys()) - {"model.weights"})
    return tuple(f"{key}: its flag has no effect, as tune.space says what to try" for key in unused)


def _read_flags(spec: Job, argv: Sequence[str]) -> dict[str, Any]:
    found = spec.arguments.model_fields | {n: Config.model_fields[n] for n in spec.sections}
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in found.items()}
    settings = create_model(
        "Flags",
        __base__=BaseSettings,
        __cls_kwargs__={"extra": "forbid", "cli_kebab_case": True, "cli_hide_none_type": True},
        **fields,
    )
    known = list_settings(settings)
    required = [f"--{name} URL" for name, field in found.items() if field.is_required()]
    parser = Parser(
        prog=f"python -m {spec.module}",
        usage=f"python -m {spec.module} {' '.join(required)} [settings]",
        description=f"{spec.arguments.__doc__} Settings may also come from a recipe or from "
        f"variables such as {ENVIRONMENT_PREFIX}TRAIN__LR. Research use only, never a diagnostic "
        "device.",
        known_keys=known,
    )
    source: CliSettingsSource[Any] = CliSettingsSource(
        settings, root_parser=parser, cli_avoid_json=True
    )
    try:
        values = source(args=list(argv))()
        _check_given_once(argv, known)
    except SettingsError as error:  # no JSON, or of another form
        raise ConfigError(f"the command line: {error}; see {parser.prog} --help") from error
    return {key: value for key, value in values.items() if value is not None}


def _check_given_once(argv: Sequence[str], types: Mapping[str, Any]) -> None:
    """Raises ConfigError for a flag that is given again, unless it takes a list."""
    given = Counter(text.split("=")[0] for text in argv if text.startswith("--"))
    for key, kind in types.items():
        flag = f"--{key.replace('_', '-')}"
        if given[flag] > 1 and get_origin(kind) is not list:
            raise ConfigError(f"{flag}: given {given[flag]} times; leave one")


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of printing its usage and leaving, and takes no
    abbreviations."""

    def __init__(self, *, known_keys: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)
        self.known_keys = known_keys

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments:"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            message = f"unknown setting {flag}"
            hint = suggest(flag.lstrip("-").replace("-", "_"), self.known_keys, flag=True)
        separator = " See" if hint else "; see"
        raise ConfigError(f"{message}{hint}{separator} {self.prog} --help")
