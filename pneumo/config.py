"""The whole configuration: one frozen, typed tree, and the layers that fill it.

    defaults  <  recipe (TOML)  <  environment (PNEUMO_TRAIN__LR=1e-3)  <  flags (--train.lr 1e-3)

Unknown keys and values that are not allowed raise ConfigError before anything starts; the message
names the key, the layer it came from and what is allowed. The docstring under a field is its line
in `--help`. What a job reads and writes (`--store`, `--run`) is no configuration: it stands in the
job's arguments, and does not change the digest.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliToggleFlag,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from pneumo import storage
from pneumo.errors import ConfigError
from pneumo.search_space import Domain, Space, flatten, grid_points, sample
from pneumo.version import REVISION

M = TypeVar("M", bound=BaseModel)

ENVIRONMENT_PREFIX = "PNEUMO_"
NOT_SETTINGS = frozenset({"PNEUMO_HASH_KEY", storage.ANONYMOUS, REVISION})
"""Environment variables with our prefix that are no settings, and read where they are needed."""

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


WEIGHTS_WITHOUT_FILE = ("imagenet", "random")
"""Values of model.weights that name no file."""
NUM_SALTS = 64
"""Splits of one seed to choose from."""


def without_folders(value: Any) -> Any:
    """The name of a file of this machine; what is none, or a URL, is as it was."""
    is_path = isinstance(value, str) and "/" in value and storage.is_local(value)
    return value.rsplit("/", 1)[-1] if is_path else value


class Section(BaseModel):
    """A branch of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PrepareConfig(Section):
    """How studies become shards."""

    image_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Height and width of the stored images, in pixels."""
    samples_per_shard: PositiveInt | None = None
    """Samples in a full shard, which is one PUT; none: 512, or of pictures above 224 px as many as
    make 27 MB."""
    max_bad_fraction: Fraction = 0.01
    """The job fails when a larger share of the studies cannot be used."""
    limit: PositiveInt | None = None
    """Use only this many studies, drawn by the seed: for a taste."""


class SplitConfig(Section):
    """Who goes to train, val and test."""

    unit: Literal["patient", "image"] = "patient"
    """What stays whole: 'patient' needs the NIH mapping file; 'image' leaks patients, and says
    so."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the patients in val, where thresholds and models are chosen."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the patients in test, which only reports."""
    salt: Annotated[int, Field(ge=0, lt=NUM_SALTS)] | None = None
    """Picks one of the 64 splits of a seed; none: the one remembered beside the source, at first
    the best balanced. The manifest states it."""
    list: str | None = None
    """CSV that says who goes where, to reproduce a published split: columns `patientId` (image ids)
    or `patient` (NIH patient numbers), and `split` (train, val, test). Others are left out."""

    @model_validator(mode="after")
    def _leaves_training_patients(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1")
        return self


class DataConfig(Section):
    """What the model is fed, and how it gets there; the latter changes no batch."""

    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    """Input height and width in pixels; none: the store's. Above the store's is an error."""
    cache: Literal["auto", "memory", "stream"] = "auto"
    """memory: a split is read once and kept decoded; stream: it is read anew each epoch; auto:
    memory where the split fits into half of what is free."""
    cache_dir: str | None = None
    """Local folder that keeps blocks of shards for later epochs and runs; none: no such cache."""
    cache_gb: PositiveFloat = 20.0
    """Largest size of `cache_dir`, in GB."""
    prefetch_blocks: PositiveInt = 16
    """Blocks, of 64 samples or 4 MB, that a stream reads ahead of the step that needs them."""
    readers: Annotated[int, Field(ge=1, le=64)] = 4
    """Threads of a worker that read and decode."""

    @model_validator(mode="after")
    def _limit_has_a_folder(self) -> Self:
        if self.cache_dir is None and self.cache_gb != type(self).model_fields["cache_gb"].default:
            raise ValueError(f"cache_gb {self.cache_gb:g} limits nothing without cache_dir")
        if self.cache_dir is not None and not self.cache_dir.startswith(("/", "~")):
            raise ValueError(
                f"cache_dir {self.cache_dir}: give a local folder by its absolute path; workers run"
                " in folders of their own"
            )
        return self


class AugmentConfig(Section):
    """Random changes of the training images; each study gets its own, from seed, epoch and key."""

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 5.0
    """Largest rotation either way."""
    translation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Largest shift along either axis, as a share of the image."""
    scale_fraction: Annotated[float, Field(ge=0, lt=0.9)] = 0.1
    """Largest change of size either way: 0.1 draws from 0.9 to 1.1."""
    flip: bool = False
    """Mirror half of the images left to right. The heart is on one side: off, unless meant."""
    brightness_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest change of brightness either way: 0.1 multiplies gray by 0.9 to 1.1."""
    contrast_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest change of contrast about the middle gray: 0.1 draws from 0.9 to 1.1."""
    gamma_fraction: Annotated[float, Field(ge=0, lt=10)] = 0.1
    """Largest change of gamma: 0.1 draws from 1 / 1.1 to 1.1."""
    erase_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest share of the image that one black rectangle hides; its area is drawn from 0 on."""


class ModelConfig(Section):
    """Which network, and what it starts from."""

    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "densenet121", "convnext_tiny", "efficientnet_v2_s"
    ] = "resnet18"
    """A network of torchvision, given one input channel and one logit."""
    weights: str = "imagenet"
    """'imagenet' (torchvision's, from its cache or the network), 'random', or the path of a state
    dict: torchvision's own or that of a self-supervised encoder."""


class TrainConfig(Section):
    """How the network is trained."""

    epochs: PositiveInt = 10
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Samples per optimiser step over all workers together."""
    micro_batch_size: Annotated[int, Field(ge=2)] = 16
    """Samples that go through the network at once, and over which BatchNorm takes its statistics;
    they make up `batch_size`, however many workers share them. Larger is faster on a GPU."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """What makes a step of the gradients."""
    lr: PositiveFloat = 1e-4
    """Learning rate."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 penalty of adam and sgd; decoupled decay of adamw."""
    clip_norm: PositiveFloat | None = None
    """Longest gradient over all weights; a longer one is shortened to it. None: no limit."""
    label_smoothing: Fraction = 0.0
    """Share of a target that is taken from its class and spread over both."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay a step, and score with it;
    none: no average."""
    pos_weight: PositiveFloat | Literal["balanced"] = "balanced"
    """Weight of positives in the loss; 'balanced' is negatives / positives of the training
    split."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, or cosine from `lr` to 0."""
    warmup_fraction: Fraction = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    precision: Literal["auto", "native", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 autocast on a GPU, float32 on a CPU;
    native: bfloat16 also on a CPU that computes in it (AVX512-BF16, AMX)."""
    compile: bool | Literal["max-autotune"] = False
    """torch.compile the network and, on a GPU, the augmentation: half a minute at the start, and
    steps in two thirds of the time on a GPU; max-autotune: the fastest kernels are searched for,
    some minutes. Needs a C compiler on the workers."""
    patience: PositiveInt | None = None
    """End the run after this many epochs without a better val AUROC; none: train them all."""
    keep_checkpoints: PositiveInt = 2
    """The last this many checkpoints stay, besides the best."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints within an epoch; none: only after each epoch."""

    @model_validator(mode="after")
    def _momentum_has_an_effect(self) -> Self:
        if self.optimizer != "sgd" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError(f"momentum {self.momentum:g} has no effect on {self.optimizer}")
        return self


class TuneConfig(Section):
    """What the search tries, and how it judges."""

    space: Annotated[Space, BeforeValidator(flatten)] = {
        "train.lr": Domain.model_validate(["log_uniform", 1e-5, 3e-3]),
        "train.pos_weight": Domain.model_validate(["log_uniform", 0.5, 10.0]),
    }
    """Keys of the configuration and what each may be, best written in a recipe, see
    pneumo/space.py: `train.lr = ["log_uniform", 1e-5, 3e-3]`, uniform, integer, choice, or a
    value."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How settings are drawn: Optuna's TPE, which learns from the trials, at random, or all of a
    grid."""
    num_trials: PositiveInt = 16
    """Settings to try; a grid has its own number."""
    epochs: PositiveInt = 9
    """Epochs of a trial that is not stopped early."""
    early_stopping: Literal["asha", "none"] = "asha"
    """ASHA stops, at each rung, the trials that are behind those that got there before."""
    grace_epochs: PositiveInt = 1
    """Epochs that each trial gets: the first rung; the next are `reduction_factor` times as
    high."""
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 3
    """One in so many trials goes on from a rung."""
    objective: Literal["auroc", "sensitivity", "log_loss"] = "auroc"
    """What is looked for on val: the highest AUROC, the highest sensitivity at `specificity`, or
    the lowest log loss after Platt's calibration, which pos_weight distorts otherwise."""
    specificity: Annotated[float, Field(gt=0, lt=1)] = 0.90
    """Specificity at which objective 'sensitivity' is taken."""
    smoothing_epochs: PositiveInt = 2
    """A trial is judged by the mean over its last so many epochs, not by its luckiest one."""
    confirm: Annotated[int, Field(ge=0)] = 0
    """Train each of the best settings again with so many new seeds, and choose by their mean;
    0: trust the search."""
    confirm_settings: PositiveInt = 3
    """How many of the best settings are confirmed."""
    workers_per_trial: PositiveInt = 1
    """Workers of one trial; above 1 each trial is a Ray Train run of its own."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}

        def refuse(name: str, why: str) -> None:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} {getattr(self, name)} has no effect {why}")

        if self.early_stopping == "none":
            refuse("grace_epochs", "without early_stopping")
            refuse("reduction_factor", "without early_stopping")
        elif self.grace_epochs > self.epochs:
            raise ValueError(f"grace_epochs {self.grace_epochs} are more than epochs {self.epochs}")
        if self.objective != "sensitivity":
            refuse("specificity", f"on objective {self.objective}")
        if not self.confirm:
            refuse("confirm_settings", "without confirm")
        if self.algorithm == "grid":
            refuse("num_trials", "on a grid, which has its own number")
            grid_points(self.space)
        elif not any(domain.varies for domain in self.space.values()):
            raise ValueError("space holds nothing that varies; give a range or a choice")
        for key, domain in self.space.items():
            if domain.points is not None and self.algorithm != "grid":
                raise ValueError(
                    f"space: {key}: points {domain.points} have an effect on a grid only"
                )
        return self

    @property
    def trials(self) -> int:
        """Settings that will be tried."""
        return grid_points(self.space) if self.algorithm == "grid" else self.num_trials

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which ASHA compares, in order; none without early stopping."""
        if self.early_stopping == "none":
            return ()
        rungs = [self.grace_epochs]
        while rungs[-1] * self.reduction_factor < self.epochs:
            rungs.append(rungs[-1] * self.reduction_factor)
        return tuple(rung for rung in rungs if rung < self.epochs)


class EvaluateConfig(Section):
    """How predictions are judged."""

    operating_point: Literal["youden", "sensitivity"] = "youden"
    """How the threshold is chosen on val: Youden's index, or the highest that keeps
    `sensitivity`."""
    sensitivity: Annotated[float, Field(gt=0, le=1)] = 0.90
    """Sensitivity to keep on val; used by operating_point 'sensitivity' and the screening row."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the patients behind each interval."""
    gallery_images: PositiveInt = 6
    """Grad-CAM pictures of each outcome (true and false positives and negatives)."""
    grid_images: PositiveInt = 16
    """Pictures in the prediction grid."""
    batch_size_per_worker: PositiveInt = 64
    """Images scored at once by a worker."""
    min_patients: PositiveInt = 10
    """Fewest patients of a class for a threshold or a calibration to be chosen on val, and for a
    subgroup to be judged."""
    calibration_bins: Annotated[int, Field(ge=2, le=100)] = 10
    """Bins of equal number in the reliability curve and the calibration error."""
    ensemble: Literal["best"] | PositiveInt = "best"
    """Checkpoints of each run whose logits are averaged: the best alone, or the last this many."""
    tta: Annotated[int, Field(ge=2, le=64)] | None = None
    """Test-time augmentation: views of each image whose logits are averaged, the image itself and
    slightly moved ones, never flipped; none: the image alone."""
    saliency: bool = True
    """Whether maps of all positives are scored against the radiologists' boxes: two passes more
    over the positives."""
    error_images: PositiveInt = 12
    """Most confident false positives, and false negatives, to show."""
    table_images: PositiveInt = 4
    """Studies of each outcome and view in W&B's table of predictions, drawn by the seed."""


class PredictConfig(Section):
    """How a folder of DICOM files is scored; the network, its ensemble and its threshold are those
    of the run's evaluation."""

    overlays: bool = True
    """Whether each image gets a PNG of itself and its Grad-CAM."""
    batch_size_per_worker: PositiveInt = 32
    """Images read and scored at once by a worker."""


class ClusterConfig(Section):
    """What the job takes of the Ray cluster."""

    num_workers: PositiveInt = 1
    """Workers that train or score; each is one DDP rank."""
    min_workers: PositiveInt | None = None
    """Training starts, and goes on after a loss, with this many, and grows back to `num_workers`;
    none: always `num_workers`."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU a worker; auto: when the cluster has any."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that a worker reserves; also its thread count."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures that a run survives by going on from its last checkpoint, a trial of a search
    likewise, and a task of an evaluation or a prediction by being done again; -1: any number."""
    start_timeout_s: PositiveFloat = 120.0
    """How long to wait for the workers' resources before giving up; a run that has begun waits as
    long as it takes."""

    @property
    def fewest_workers(self) -> int:
        """Workers that training cannot do without."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _fewest_are_not_more(self) -> Self:
        if self.fewest_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}"
            )
        return self


class TrackingConfig(Section):
    """What goes to Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """online: sent while the job runs; offline: left to `python -m jobs.track`; disabled: not
    spoken of; auto: online with a key (WANDB_API_KEY or a login), offline without."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] = "pneumo"
    """The W&B project."""
    entity: str | None = None
    """The W&B team or user; none: the key's default."""
    group: str | None = None
    """Runs of one experiment share a group; none: a training and its evaluation share one."""
    image_pixels: Annotated[int, Field(ge=16, le=4096)] = 192
    """Largest height of a study's picture in W&B; nothing larger is sent."""


class Config(Section):
    """The root."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the split, the order, the augmentation and the initial weights."""
    prepare: PrepareConfig = PrepareConfig()
    split: SplitConfig = SplitConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    predict: PredictConfig = PredictConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def to_json(self) -> str:
        """The tree as JSON, two spaces deep; `Config.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2) + "\n"

    def for_others(self) -> dict[str, Any]:
        """The tree as W&B and the report get it: of a file of this machine, its name alone."""
        tree = self.model_dump(mode="json")
        for section, name in (("model", "weights"), ("data", "cache_dir"), ("split", "list")):
            tree[section][name] = without_folders(tree[section][name])
        space = tree["tune"]["space"]
        space.update({key: [*map(without_folders, domain)] for key, domain in space.items()})
        return tree

    def digest(self, *sections: str) -> str:
        """SHA-256 (hex) of the canonical JSON of `sections`, or of the whole tree without any."""
        tree = self.model_dump(mode="json", include=set(sections) or None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


class Arguments(Section):
    """What every job takes besides the configuration."""

    recipe: str | None = None
    """A recipe's name (`fast`) or a TOML file: settings that differ from the defaults."""
    debug: CliToggleFlag[bool] = False
    """Show the traceback of an error."""


class PrepareArguments(Arguments):
    source: str
    """Folder in Kaggle's layout: label and class tables, the NIH mapping, the DICOM files."""
    store: str
    """Where the shards go: a folder or s3:// URL."""


class TrainArguments(Arguments):
    store: str
    """A prepared store: a folder or s3:// URL."""
    run: str | None = None
    """Where the run is written; none: runs/<job>-<time>. The URL of an unfinished run resumes
    it."""


class TuneArguments(TrainArguments):
    pass


class EvaluateArguments(Arguments):
    store: str
    """A prepared store: a folder or s3:// URL."""
    run: str
    """The run to evaluate; its best checkpoint is scored and the results are written into it."""
    members: list[str] = []
    """More runs, trained on the same store, whose logits are averaged with the run's:
    `--members RUN2,RUN3`."""
    overwrite: CliToggleFlag[bool] = False
    """Evaluate a run again that has been evaluated."""
    compare_with: str | None = None
    """Another run, evaluated on the same studies, whose predictions this one's are compared
    with."""


class PredictArguments(Arguments):
    source: str
    """A folder or s3:// URL with DICOM files in it, however deep; nothing else is needed."""
    run: str
    """A trained run; where it is evaluated, its threshold and calibration are used."""
    output: str
    """Where predictions.csv, predictions.parquet and overlays/ go: a folder or s3:// URL."""
    members: list[str] = []
    """The other runs of the ensemble that was evaluated: `--members RUN2,RUN3`."""
    overwrite: CliToggleFlag[bool] = False
    """Replace what an earlier prediction left in the output."""


class TrackArguments(Arguments):
    run: str
    """The run or search to send to W&B."""
    anew: CliToggleFlag[bool] = False
    """Send it as new W&B runs; for runs that were deleted there, as W&B takes no id twice."""


@dataclass(frozen=True)
class Job:
    """What a job is called, and which parts of the configuration have an effect on it."""

    module: str
    arguments: type[Arguments]
    sections: tuple[str, ...]


JOBS: Mapping[str, Job] = {
    "prepare": Job("jobs.prepare", PrepareArguments, ("seed", "prepare", "split")),
    "train": Job(
        "jobs.train",
        TrainArguments,
        ("seed", "data", "augment", "model", "train", "cluster", "tracking"),
    ),
    "tune": Job(
        "jobs.tune",
        TuneArguments,
        ("seed", "data", "augment", "model", "train", "tune", "cluster", "tracking"),
    ),
    "evaluate": Job(
        "jobs.evaluate", EvaluateArguments, ("seed", "evaluate", "cluster", "tracking")
    ),
    "predict": Job("jobs.predict", PredictArguments, ("predict", "cluster")),
    "track": Job("jobs.track", TrackArguments, ("tracking",)),
}


@dataclass(frozen=True)
class Invocation:
    """A job with its arguments and configuration, checked."""

    job: str
    arguments: Arguments
    config: Config


def parse_command_line(
    job: str, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> Invocation:
    """The invocation that the layers add up to.

    Raises ConfigError for anything unknown or not allowed. `--help` prints and exits 0.
    """
    spec = JOBS[job]
    environ = os.environ if environ is None else environ
    flags = _read_flags(spec, argv)
    recipe = flags.get("recipe")
    layers = [
        ("the environment", _read_environment(environ)),
        ("the command line", flags),
    ]
    if recipe is not None:
        layers.insert(0, (f"recipe {recipe}", read_recipe(str(recipe))))
    arguments = {k: v for k, v in flags.items() if k in spec.arguments.model_fields}
    layers[-1] = (layers[-1][0], {k: v for k, v in flags.items() if k not in arguments})
    config = _validate(Config, layers)
    if job == "tune":
        check_space(config)
    if job != "train" and config.cluster.min_workers is not None:
        raise ConfigError(f"cluster.min_workers: {job} is not elastic, only train is; leave it out")
    if job == "tune" and config.cluster.num_workers != ClusterConfig().num_workers:
        raise ConfigError(
            "cluster.num_workers: a search takes what the cluster has; the workers of a trial are "
            "tune.workers_per_trial"
        )
    return Invocation(
        job=job,
        arguments=_validate(spec.arguments, [("the command line", arguments)]),
        config=config,
    )


def override(config: Config, changes: Mapping[str, Any], layer: str = "the search space") -> Config:
    """`config` with `changes` by dotted key (`{"train.lr": 1e-3}`). Raises ConfigError."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        branch = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return _validate(Config, [("the configuration", config.model_dump()), (layer, tree)])


def check_space(config: Config) -> list[dict[str, Any]]:
    """Settings that stand for all that the search space may draw, each of them allowed.

    Raises ConfigError naming the key that is unknown, not to be searched, or may draw a value that
    is not allowed.
    """
    known = tuple(_flatten_fields(Config))
    for key, domain in config.tune.space.items():
        if key not in known:
            raise ConfigError(f"tune.space: unknown setting {key}{_did_you_mean(key, known)}")
        if reason := _NOT_SEARCHED.get(key):
            raise ConfigError(f"tune.space: {key} cannot be searched: {reason}")
        if key.split(".")[0] not in _SEARCHED and key != "data.image_size":
            raise ConfigError(
                f"tune.space: {key} has no effect on how a model learns; searched are "
                f"data.image_size and what is in {', '.join(_SEARCHED)}"
            )
        if key == "model.weights":
            _check_searched_weights(domain)
    settings = sample(config.tune.space)
    for setting in settings:
        override(config, setting, "tune.space")
    return settings


def _check_searched_weights(domain: Domain) -> None:
    for value in map(str, domain.values):
        whole = value.startswith("/") or "://" in value
        if value not in WEIGHTS_WITHOUT_FILE and not whole:
            raise ConfigError(
                f"tune.space: model.weights: {value!r} must be a whole path or a URL; trials run "
                "in folders of their own"
            )


_SEARCHED = ("augment", "model", "train")
_NOT_SEARCHED = {
    "seed": "the luckiest would win; tune.confirm trains the best with new ones",
    "train.epochs": "a trial has tune.epochs",
    "train.patience": "a trial has tune.epochs, and tune.early_stopping is what ends it before",
    "train.keep_checkpoints": "it changes no model",
    "train.checkpoint_every_steps": "it changes no model",
    "train.compile": "it changes no model",
}


def read_recipe(name_or_url: str) -> dict[str, Any]:
    """The settings of a recipe: a name in `jobs/recipes`, or the path or URL of a TOML file."""
    folder = resources.files("jobs") / "recipes"
    try:
        if name_or_url.endswith(".toml"):
            text = storage.read_text(storage.normalise(name_or_url))
        else:
            text = (folder / f"{name_or_url}.toml").read_text()
        return tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError) as error:
        names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())
        raise ConfigError(
            f"recipe {name_or_url}: not found; give a TOML file or one of: {', '.join(names)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {name_or_url}: not valid TOML: {error}") from error


def _read_flags(spec: Job, argv: Sequence[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in [
            *spec.arguments.model_fields.items(),
            *((name, Config.model_fields[name]) for name in spec.sections),
        ]
    }
    settings = create_model(
        "Flags",
        __base__=BaseSettings,
        __cls_kwargs__={"extra": "forbid", "cli_kebab_case": True, "cli_hide_none_type": True},
        **fields,
    )
    parser = _Parser(
        prog=f"python -m {spec.module}",
        usage=f"python -m {spec.module} {_required(spec.arguments)} [settings]",
        description=f"See {ENVIRONMENT_PREFIX}TRAIN__LR-like variables and recipes for other ways "
        "to set the same. Research use only, never a diagnostic device.",
        allow_abbrev=False,
        known_keys=tuple(_flatten_fields(settings)),
    )
    source: CliSettingsSource[Any] = CliSettingsSource(
        settings, root_parser=parser, cli_avoid_json=True
    )
    values = source(args=list(argv))()
    return {key: value for key, value in values.items() if value is not None}


def _required(arguments: type[Arguments]) -> str:
    fields = arguments.model_fields.items()
    return " ".join(f"--{name} URL" for name, field in fields if field.is_required())


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    class Environment(Config, BaseSettings):
        model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__")

    for name in environ:
        if not name.startswith(ENVIRONMENT_PREFIX) or name in NOT_SETTINGS:
            continue
        section, *below = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if section not in Config.model_fields or (below and section == "seed"):
            raise ConfigError(
                f"environment variable {name}: no such setting; variables are "
                f"{ENVIRONMENT_PREFIX}SECTION__KEY, sections: {', '.join(Config.model_fields)}"
            )
    source = EnvSettingsSource(Environment)
    source.env_vars = {k.lower(): v for k, v in environ.items()}
    try:
        return source()
    except SettingsError as error:
        raise ConfigError(
            f"the environment: {error}; set one key a variable: {ENVIRONMENT_PREFIX}SECTION__KEY"
        ) from error


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def __init__(self, *args: Any, known_keys: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.known_keys = known_keys

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments:"):
            flag = message.split(": ", 1)[1].split()[0].split("=")[0]
            message = f"unknown setting {flag}"
            hint = _did_you_mean(flag.lstrip("-").replace("-", "_"), self.known_keys, flag=True)
        raise ConfigError(f"{message}{hint}; see {self.prog} --help")


def _validate(model: type[M], layers: Sequence[tuple[str, dict[str, Any]]]) -> M:
    merged: dict[str, Any] = {}
    for _, tree in layers:
        _merge(merged, tree)
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, layers)) from error


def _explain(
    model: type[BaseModel], error: ValidationError, layers: Sequence[tuple[str, dict[str, Any]]]
) -> str:
    known = tuple(_flatten_fields(model))
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        key = ".".join(path[: 2 if len(path) > 1 and path[0] in Config.model_fields else 1])
        layer = next(
            (name for name, tree in reversed(layers) if _has(tree, key)), "the command line"
        )
        if item["type"] == "extra_forbidden":
            lines[f"unknown setting {key} in {layer}{_did_you_mean(key, known)}"] = []
        elif item["type"] == "missing":
            lines[f"--{key.replace('_', '-')} is required"] = []
        else:
            text = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            inner = f" {path[2]}:" if key == "tune.space" and len(path) > 2 else ""
            head = f"{key}:{inner} got {item['input']!r} from {layer}, expected "
            if item["type"] == "value_error":
                head = f"{key}:{inner} "
            lines.setdefault(head, []).append(text)
    return "; ".join(head + " or ".join(texts) for head, texts in lines.items())


def _did_you_mean(key: str, known: Sequence[str], *, flag: bool = False) -> str:
    section = key.split(".")[0]
    if section == key:
        known = [*dict.fromkeys(k.split(".")[0] for k in known)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    siblings = [k for k in known if k.startswith(section + ".") or (section == key and not flag)]
    show = [f"--{k.replace('_', '-')}" if flag else k for k in close or siblings]
    if close:
        return f", did you mean {show[0]}?"
    return f", allowed: {', '.join(show)}" if show else ""


def _flatten_fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    leaves: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            leaves |= _flatten_fields(field.annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = field
    return leaves


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def _has(tree: Mapping[str, Any], key: str) -> bool:
    branch: Any = tree
    for part in key.split("."):
        if not isinstance(branch, Mapping) or part not in branch:
            return False
        branch = branch[part]
    return True
