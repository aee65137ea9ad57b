"""The layers that fill the configuration, and what a mistake in one of them says.

    defaults  <  recipe (TOML)  <  environment (PNEUMO_TRAIN__LR=1e-3)  <  flags (--train.lr 1e-3)

Unknown keys and values that are not allowed raise ConfigError before anything starts; the message
names the key, the layer it came from and what is allowed.
"""

import difflib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from pneumo import storage
from pneumo.config import WEIGHTS_WITHOUT_FILE, Config, Section
from pneumo.errors import ConfigError
from pneumo.search_space import flatten, sample
from pneumo.version import REVISION

M = TypeVar("M", bound=BaseModel)
Layer = tuple[str, Mapping[str, Any]]
"""What a layer is called in messages, and its settings as a tree."""

ENVIRONMENT_PREFIX = "PNEUMO_"
LATER_ATTEMPT = "PNEUMO_LATER_ATTEMPT"
"""Set where an earlier attempt at the same submission may have ended the job."""
_NOT_SETTINGS = frozenset({"PNEUMO_HASH_KEY", storage.ANONYMOUS, REVISION, LATER_ATTEMPT})
"""Environment variables with our prefix that are no settings, and read where they are needed."""

_REMOVED = {
    "prepare.samples_per_shard": "it follows from the image size",
    "data.cache_dir": "data.cache keeps a split in memory",
    "data.cache_gb": "data.cache keeps a split in memory",
    "data.prefetch_blocks": "a stream reads 16 blocks ahead",
    "data.readers": "4 threads of a worker read and decode",
    "augment.erase_fraction": "no part of an image is erased",
    "augment.flip": "images are not flipped",
    "augment.brightness_fraction": "use augment.gray_fraction",
    "augment.contrast_fraction": "use augment.gray_fraction",
    "augment.gamma_fraction": "use augment.gray_fraction",
    "train.label_smoothing": "targets are 0 and 1",
    "train.momentum": "it is 0.9",
    "tune.grace_epochs": "trials are compared after 1, 3, 9, … epochs",
    "tune.reduction_factor": "trials are compared after 1, 3, 9, … epochs",
    "tune.smoothing_epochs": "it follows from tune.epochs",
    "tune.confirm_settings": "the best 3 are confirmed",
    "evaluate.gallery_images": "use evaluate.pictures",
    "evaluate.grid_images": "use evaluate.pictures",
    "evaluate.error_images": "use evaluate.pictures",
    "evaluate.table_images": "use evaluate.pictures",
    "evaluate.batch_size_per_worker": "it follows from the image size",
    "evaluate.calibration_bins": "there are 10",
    "predict.batch_size_per_worker": "it follows from the image size",
    "predict.overlays": "use --no-overlays",
    "tracking.image_pixels": "pictures are at most 192 pixels high",
}
"""Settings of earlier versions, and what holds in their place."""
_REMOVED_VALUES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("train", "precision"): {"native": "auto"},
    ("train", "compile"): {"max-autotune": True},
}


def override(config: Config, changes: Mapping[str, Any], layer: str = "the search space") -> Config:
    """`config` with `changes` by dotted key (`{"train.lr": 1e-3}`). Raises ConfigError."""
    tree: dict[str, Any] = {}
    for key, value in changes.items():
        branch = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return validate(Config, [("the configuration", config.model_dump()), (layer, tree)])


def drop_removed(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration without the settings and values that only earlier versions had."""
    tree: dict[str, Any] = {}
    for section, settings in saved.items():
        tree[section] = settings
        if isinstance(settings, Mapping):
            tree[section] = {
                name: _REMOVED_VALUES.get((section, name), {}).get(str(value), value)
                for name, value in settings.items()
                if f"{section}.{name}" not in _REMOVED
            }
    return {section: settings for section, settings in tree.items() if settings != {}}


def check_batch_size(batch_size: int, micro_batch_size: int, num_workers: int) -> None:
    """Raises ConfigError unless a batch is whole micro-batches, and at least one a worker."""
    if batch_size % micro_batch_size:
        raise ConfigError(
            f"train.batch_size: {batch_size} is no multiple of train.micro_batch_size "
            f"{micro_batch_size}; change one of them"
        )
    if (count := batch_size // micro_batch_size) < num_workers:
        raise ConfigError(
            f"train.batch_size: {batch_size} is {count} micro-batches of {micro_batch_size}, too "
            f"few for {num_workers} workers; raise it, lower train.micro_batch_size, or take fewer "
            "workers"
        )


def check_space(config: Config) -> list[dict[str, Any]]:
    """Settings that stand for all that the search space may draw, each of them allowed.

    Raises ConfigError naming the key that is unknown, not to be searched, or may draw a value that
    is not allowed.
    """
    known = list_settings(Config)
    for key, domain in config.tune.space.items():
        if key not in known:
            raise ConfigError(f"tune.space: unknown setting {key}{suggest(key, known)}")
        if reason := _NOT_SEARCHED.get(key):
            raise ConfigError(f"tune.space: {key} cannot be searched: {reason}")
        if key.split(".")[0] not in _SEARCHED and key != "data.image_size":
            raise ConfigError(
                f"tune.space: {key} has no effect on the trained model; a search varies "
                f"data.image_size and the settings in {', '.join(_SEARCHED)}"
            )
        for value in map(str, domain.values if key == "model.weights" else ()):
            whole = value.startswith("/") or "://" in value
            if value not in WEIGHTS_WITHOUT_FILE and not whole:
                raise ConfigError(
                    f"tune.space: model.weights: {value!r} must be an absolute path or a URL; "
                    "each trial has its own working folder"
                )
    settings = sample(config.tune.space)
    for setting in settings:
        override(config, setting, "tune.space")
    return settings


_SEARCHED = ("augment", "model", "train")
_NOT_SEARCHED = {
    "seed": "the luckiest seed would be chosen; tune.confirm trains the best with new seeds",
    "train.epochs": "a trial is trained for tune.epochs",
    "train.patience": "trials are stopped early by tune.early_stopping",
    "train.keep_checkpoints": "it does not change the model",
    "train.checkpoint_every_steps": "it does not change the model",
    "train.compile": "it does not change the model",
}


def read_recipe(name_or_url: str) -> dict[str, Any]:
    """The settings of a recipe: a name in `jobs/recipes`, or the path or URL of a TOML file.

    Raises ConfigError where there is none, or where it is no TOML.
    """
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


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings among environment variables. Raises ConfigError for one that is no setting."""

    class Environment(Config, BaseSettings):
        model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__")

    for name in environ:
        if not name.upper().startswith(ENVIRONMENT_PREFIX) or name in _NOT_SETTINGS:
            continue
        section, *below = name[len(ENVIRONMENT_PREFIX) :].lower().split("__")
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
            f"the environment: {error}; set one variable per key: {ENVIRONMENT_PREFIX}SECTION__KEY;"
            """ a list, or tune.space, as JSON: '["A", "B"]'"""
        ) from error


def validate(model: type[M], layers: Sequence[Layer]) -> M:
    """The model that the layers add up to, the last one winning. Raises ConfigError."""
    try:
        return model.model_validate(merge(tree for _, tree in layers))
    except ValidationError as error:
        raise ConfigError(_explain(model, error, layers)) from error


def merge(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One tree of several, a later one winning."""
    merged: dict[str, Any] = {}
    for tree in trees:
        _merge(merged, tree)
    return merged


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        # A search space is one value: no key of an earlier layer stays in it.
        if isinstance(value, Mapping) and isinstance(target.get(key), dict) and key != "space":
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(model: type[BaseModel], error: ValidationError, layers: Sequence[Layer]) -> str:
    """One line for all mistakes; all that one value may be stands together."""
    allowed: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        key = ".".join(path[: 2 if len(path) > 1 and path[0] in Config.model_fields else 1])
        layers_with_it = (
            name
            for name, tree in reversed(layers)
            if any(f"{known}.".startswith(f"{key}.") for known in flatten(tree))
        )
        layer = next(layers_with_it, "the command line")
        if item["type"] == "extra_forbidden":
            allowed[f"unknown setting {key} in {layer}{suggest(key, list_settings(model))}"] = []
        elif item["type"] == "missing":
            allowed[f"--{key.replace('_', '-')} is required"] = []
        else:
            text = item["msg"]
            for prefix in ("Value error, ", "Input should be ", "String should have "):
                text = text.removeprefix(prefix)
            head = f"{key}:{f' {path[2]}:' if key == 'tune.space' and len(path) > 2 else ''} "
            if item["type"] != "value_error":
                head += f"got {item['input']!r} from {layer}, expected "
            allowed.setdefault(head, []).append(text)
    return "; ".join(head + " or ".join(texts) for head, texts in allowed.items())


def suggest(key: str, known: Collection[str], *, flag: bool = False) -> str:
    """What to write for an unknown key, behind the message; '' where nothing can be said."""
    if removed := _REMOVED.get(key):
        return f", which was removed: {removed}"
    section = key.split(".")[0]
    if section == key:
        known = [*dict.fromkeys(k.split(".")[0] for k in known)]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    siblings = [k for k in known if k.startswith(section + ".") or (section == key and not flag)]
    show = [f"--{k.replace('_', '-')}" if flag else k for k in close or siblings]
    if close:
        return f", did you mean {show[0]}?"
    return f", allowed: {', '.join(show)}" if show else ""


def list_settings(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The dotted keys of all settings of a model, and their types."""
    keys: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= list_settings(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field.annotation
    return keys
