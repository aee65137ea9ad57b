"""The whole configuration: one frozen, typed tree.

`config_layers.py` fills it from a recipe, the environment and flags. The docstring under a field is
its line in `--help`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, Field, PositiveInt, model_validator

from pneumo.search_space import Domain, Space, flatten, grid_points

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

WEIGHTS_WITHOUT_FILE = ("imagenet", "random")
"""Values of model.weights that name no file."""
NUM_SALTS = 64  # splits of one seed to choose from
REDUCTION_FACTOR = 3
"""One in this many trials goes on from a rung of ASHA; the next rung is this many times as high."""


def without_folders(value: Any) -> Any:
    """The name alone of a path or URL; any other value as it is."""
    return value.rstrip("/").rsplit("/", 1)[-1] if isinstance(value, str) else value


class Section(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A branch of the tree."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, written: Any) -> Any:
        """`none`, as `--help` calls it, of a setting that may be none. True and false of a number
        become words, which are refused, as pydantic takes them for 1 and 0."""
        if not isinstance(written, Mapping):
            return written
        read = dict(written)
        for name, field in cls.model_fields.items():
            value, types = written.get(name), (field.annotation, *get_args(field.annotation))
            if value == "none" and type(None) in types:
                read[name] = None
            elif isinstance(value, bool) and bool not in types and str not in types:
                read[name] = str(value).lower()
        return read


def _unless_default(default: Any) -> Any:
    """A field that is not written while it has its default, so that older digests stay the same."""
    return Field(exclude_if=lambda value: value == default)


Layout = Literal[
    "auto", "rsna", "rsna-without-classes", "own-table", "nih", "chexpert", "vindr", "kermany"
]


class PrepareConfig(Section):
    """How studies become shards."""

    image_size: Annotated[int, Field(ge=32, le=1024)] = 224
    """Height and width of the stored images, in pixels."""
    max_bad_fraction: Fraction = 0.01
    """The job fails when a larger fraction of the studies cannot be used."""
    limit: PositiveInt | None = None
    """A random subset of this size, for trying out."""
    layout: Annotated[Layout, _unless_default("auto")] = "auto"
    """The source's folder layout; auto: recognised by its files."""
    positive: Annotated[list[str], _unless_default([])] = Field(default=[])
    """Labels that count as positive, of NIH's, CheXpert's and VinDr's; none: Pneumonia."""
    uncertain: Annotated[Literal["ignore", "negative", "positive"], _unless_default("ignore")] = (
        "ignore"
    )
    """How CheXpert's uncertain labels count; ignore: these images are left out."""
    without: Annotated[list[str], _unless_default([])] = Field(default=[])
    """Patients and images in train or val of these stores are left out."""


class SplitConfig(Section):
    """Which studies go to train, val and test."""

    unit: Literal["patient", "image"] = "patient"
    """What is never divided between splits: 'patient' needs the NIH mapping file; with 'image' a
    patient may be in several splits, and a warning says so."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the patients in val, where thresholds and models are chosen."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of the patients in test, where nothing is chosen."""
    salt: Annotated[int, Field(ge=0, lt=NUM_SALTS)] | None = None
    """Which of the 64 splits of a seed; none: the one saved beside the source, for a new source
    the best balanced. It is recorded in the manifest."""
    named: Annotated[
        Literal["rsna-v1", "nih-v1", "published", "hash"] | None, _unless_default(None)
    ] = None
    """rsna-v1, nih-v1: the public splits of docs/benchmark.md; published: the source's own; hash:
    by a hash of the patient in any case; none: published for an own table with a column `split`
    and for NIH with its two lists, else hash."""
    list: str | None = None
    """CSV of a published split: columns `patientId` (image ids) or `patient` (NIH patient numbers),
    and `split` (train, val, test). Studies that are not listed are left out."""

    @model_validator(mode="after")
    def _train_is_not_empty(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.named in (None, "hash"):
            return self
        fields = type(self).model_fields
        idle = ["list", "salt"]
        if self.named != "published":
            idle += ["val_fraction", "test_fraction"]
        for name in idle:
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no effect on the split {self.named}; leave one out")
        return self


class DataConfig(Section):
    """How the model's input is read."""

    image_size: Annotated[int, Field(ge=32, le=1024)] | None = None
    """Input height and width in pixels; none: the store's. Above the store's is an error."""
    cache: Literal["auto", "memory", "stream"] = "auto"
    """memory: a split is read once and kept decoded; stream: it is read again each epoch;
    auto: memory where the split fits into half of the free memory. The batches are the same."""


class AugmentConfig(Section):
    """Random changes of the training images; each study gets its own, from seed, epoch and key."""

    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 5.0
    """Largest rotation either way."""
    translation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Largest shift along either axis, as a fraction of the image."""
    scale_fraction: Annotated[float, Field(ge=0, lt=0.9)] = 0.1
    """Largest change of size either way: 0.1 draws from 0.9 to 1.1."""
    gray_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Largest change of brightness, of contrast about the middle gray, and of gamma: 0.1 draws each
    factor from 0.9 to 1.1."""


class ModelConfig(Section):
    """The network and its initial weights."""

    backbone: Literal[
        "resnet18", "resnet34", "resnet50", "densenet121", "convnext_tiny", "efficientnet_v2_s"
    ] = "resnet18"
    """A network of torchvision, given one input channel and one logit."""
    weights: str = "imagenet"
    """'imagenet' (torchvision's, from its cache or the network), 'random', a run's folder (its best
    checkpoint), or the path of a state dict: torchvision's own or of a self-supervised encoder."""


class TrainConfig(Section):
    """How the network is trained."""

    epochs: PositiveInt = 10
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Samples per optimiser step over all workers together."""
    micro_batch_size: Annotated[int, Field(ge=2)] = 16
    """Samples of one forward pass, over which BatchNorm computes its statistics; `batch_size` is a
    multiple of it, for any number of workers. Larger is faster on a GPU."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """The optimiser; sgd has a momentum of 0.9."""
    lr: PositiveFloat = 1e-4
    """Learning rate."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 penalty of adam and sgd; decoupled decay of adamw."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the gradient over all weights; a larger one is scaled down to it. None: no
    limit."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay a step, and score with it;
    none: no average."""
    pos_weight: PositiveFloat | Literal["balanced"] = "balanced"
    """Weight of positives in the loss; 'balanced' is negatives / positives of the training
    split."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, or cosine from `lr` to 0."""
    warmup_fraction: Fraction = 0.0
    """Fraction of the steps over which the learning rate rises from 0."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward; auto: bfloat16 autocast on a GPU, float32 on a CPU. A
    CPU without bfloat16 instructions (AVX512-BF16, AMX) emulates them with the same results, but a
    step takes 2 (AVX-512) to 10 times (AVX2) as long as in float32."""
    compile: bool = False
    """torch.compile the network and, on a GPU, the augmentation: half a minute at the start, and
    steps in two thirds of the time on a GPU. Needs a C compiler on the workers."""
    patience: PositiveInt | None = None
    """End the run after this many epochs without a better val AUROC; none: train all epochs."""
    keep_checkpoints: PositiveInt = 2
    """How many of the last checkpoints are kept, besides the best."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between checkpoints within an epoch; none: only after each epoch."""


class TuneConfig(Section):
    """What the search tries, and how trials are compared."""

    space: Annotated[Space, BeforeValidator(flatten)] = {
        "train.lr": Domain.model_validate(["log_uniform", 1e-5, 3e-3]),
        "train.pos_weight": Domain.model_validate(["log_uniform", 0.5, 10.0]),
    }
    """Settings and what each may be, best written in a recipe, see pneumo/search_space.py:
    `train.lr = ["log_uniform", 1e-5, 3e-3]`, uniform, integer, choice, or a value."""
    algorithm: Literal["tpe", "random", "grid"] = "tpe"
    """How settings are drawn: Optuna's TPE, which learns from the trials, at random, or all of a
    grid."""
    num_trials: PositiveInt = 16
    """Settings to try; a grid has its own number."""
    epochs: PositiveInt = 9
    """Epochs of a trial that is not stopped early."""
    early_stopping: Literal["asha", "none"] = "asha"
    """ASHA compares the trials after 1, 3, 9, … epochs, and stops those that are not in the best
    third of what was there so far."""
    objective: Literal["auroc", "sensitivity", "log_loss"] = "auroc"
    """What is optimised on val: AUROC, sensitivity at `specificity`, or log loss after Platt
    scaling (without it, pos_weight distorts the loss)."""
    specificity: Annotated[float, Field(gt=0, lt=1)] = 0.90
    """Specificity at which objective 'sensitivity' is taken."""
    confirm: Annotated[int, Field(ge=0)] = 0
    """Train each of the best 3 settings again with this many new seeds, and choose by their mean;
    0: take the best trial."""
    workers_per_trial: PositiveInt = 1
    """Workers of one trial; above 1 each trial is a Ray Train run of its own."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        if self.objective != "sensitivity" and self.specificity != fields["specificity"].default:
            raise ValueError(
                f"specificity {self.specificity} has no effect on objective {self.objective}"
            )
        if self.algorithm == "grid":
            if self.num_trials != fields["num_trials"].default:
                raise ValueError(
                    f"num_trials {self.num_trials} has no effect on a grid, which has its own"
                )
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
    def smoothing_epochs(self) -> int:
        """A trial's objective is the mean over this many last epochs, not its luckiest epoch."""
        return 2 if self.epochs > 3 else 1

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs after which ASHA compares, in order; none without early stopping."""
        if self.early_stopping == "none":
            return ()
        rungs = [1]
        while rungs[-1] < self.epochs:
            rungs.append(rungs[-1] * REDUCTION_FACTOR)
        return tuple(rungs[:-1])


class EvaluateConfig(Section):
    """How predictions are evaluated."""

    operating_point: Literal["youden", "sensitivity"] = "youden"
    """How the threshold is chosen on val: Youden's index, or the highest that keeps
    `sensitivity`."""
    sensitivity: Annotated[float, Field(gt=0, le=1)] = 0.90
    """Sensitivity to keep on val; used by operating_point 'sensitivity' and the screening row."""
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the patients behind each interval."""
    pictures: PositiveInt = 6
    """Studies shown of each outcome (true and false positives and negatives); of the most confident
    errors of each kind, twice as many."""
    min_patients: PositiveInt = 10
    """Fewest patients of a class for a threshold or a calibration to be chosen on val, and for a
    subgroup to be evaluated."""
    ensemble: Literal["best"] | PositiveInt = "best"
    """Checkpoints of each run whose logits are averaged: the best alone, or the last this many."""
    tta: Annotated[int, Field(ge=2, le=64)] | None = None
    """Test-time augmentation: views of each image whose logits are averaged, the image itself and
    slightly moved ones; none: the image alone."""
    saliency: bool = True
    """Whether maps of all positives are scored against the radiologists' boxes: two passes more
    over the positives."""


class ClusterConfig(Section):
    """Resources of the Ray cluster that the job uses."""

    num_workers: PositiveInt = 1
    """Workers that train or score; each is one DDP rank."""
    min_workers: PositiveInt | None = None
    """Training starts, and continues after a loss, with at least this many, and grows back to
    `num_workers`; none: always `num_workers`."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU a worker; auto: when the cluster has any."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that a worker reserves; also its thread count."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures that are recovered from: a run or a trial of a search resumes from its last
    checkpoint, a task of an evaluation or a prediction is repeated; -1: any number."""
    start_timeout_s: PositiveFloat = 120.0
    """How long to wait for the workers' resources before giving up; a run that has started waits
    without a limit."""

    @property
    def fewest_workers(self) -> int:
        """Minimum number of workers for training."""
        return self.min_workers or self.num_workers

    @model_validator(mode="after")
    def _fewest_are_not_more(self) -> Self:
        if self.fewest_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}"
            )
        return self


class TrackingConfig(Section):
    """What is sent to Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """online: sent while the job runs; offline: sent later, by `python -m jobs.track`; disabled:
    not mentioned; auto: online with a key (WANDB_API_KEY or a login), offline without."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] = "pneumo"
    """The W&B project."""
    entity: str | None = None
    """The W&B team or user; none: the key's default."""
    group: str | None = None
    """Runs of one experiment share a group; none: a training and its evaluation share one."""


class Config(Section):
    """The root.

    >>> config = pneumo.Config.model_validate({"train": {"epochs": 3, "lr": 1e-3}})
    """

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
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    def to_json(self) -> str:
        """The tree as JSON, two spaces deep; `Config.model_validate_json` reads it back."""
        return self.model_dump_json(indent=2) + "\n"

    def without_paths(self) -> dict[str, Any]:
        """The tree as W&B and the report get it: of a file or store, its name alone."""
        tree = self.model_dump(mode="json")
        for section, name in (("model", "weights"), ("split", "list")):
            tree[section][name] = without_folders(tree[section][name])
        if "without" in tree["prepare"]:
            tree["prepare"]["without"] = [*map(without_folders, tree["prepare"]["without"])]
        space = tree["tune"]["space"]
        space.update({key: [*map(without_folders, domain)] for key, domain in space.items()})
        return tree

    def digest(self, *sections: str) -> str:
        """SHA-256 (hex) of the canonical JSON of `sections`, or of the whole tree without any."""
        tree = self.model_dump(mode="json", include=set(sections) or None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


TRAINING_SECTIONS = ("seed", "data", "augment", "model", "train")
"""The settings that a resumed run must share with its checkpoint, except `_NOT_COMPARED`, which do
not change the weights."""
_NOT_COMPARED = {"compile", "keep_checkpoints", "checkpoint_every_steps"}


def changed_sections(before: Config, now: Config) -> list[str]:
    """The `TRAINING_SECTIONS` in which a run would not be the one that was begun."""
    then, there = (training_settings(each) for each in (before, now))
    return [name for name in TRAINING_SECTIONS if then[name] != there[name]]


def training_settings(config: Config) -> dict[str, Any]:
    """The settings that change the trained weights, by section."""
    settings = config.model_dump(include=set(TRAINING_SECTIONS))
    train = {name: v for name, v in settings["train"].items() if name not in _NOT_COMPARED}
    return {**settings, "data": {"image_size": config.data.image_size}, "train": train}
