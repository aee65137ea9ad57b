"""Four layers make one checked tree; a mistake is named with its place and what is allowed."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pneumo.config import (
    JOBS,
    Config,
    EvaluateArguments,
    Section,
    TrainArguments,
    override,
    parse_command_line,
    read_recipe,
)
from pneumo.errors import ConfigError, UserError

NEEDED = {
    "prepare": ["--source", "in", "--store", "out"],
    "train": ["--store", "s"],
    "tune": ["--store", "s"],
    "evaluate": ["--store", "s", "--run", "r"],
    "predict": ["--source", "in", "--run", "r", "--output", "out"],
    "track": ["--run", "r"],
}
RECIPES = sorted(
    entry.name.removesuffix(".toml")
    for entry in (resources.files("jobs") / "recipes").iterdir()
    if entry.name.endswith(".toml")
)

positive = st.floats(min_value=1e-300, allow_infinity=False, allow_nan=False)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31 - 1),
    "prepare.image_size": st.integers(32, 1024),
    "prepare.max_bad_fraction": st.floats(0, 1, exclude_max=True),
    "prepare.limit": st.none() | st.integers(1),
    "split.unit": st.sampled_from(["patient", "image"]),
    "split.val_fraction": st.floats(0.01, 0.5),
    "split.salt": st.none() | st.integers(0, 63),
    "data.image_size": st.none() | st.integers(32, 1024),
    "augment.rotation_degrees": st.floats(0, 180),
    "augment.scale_fraction": st.floats(0, 0.9, exclude_max=True),
    "model.weights": st.text(),
    "train.batch_size": st.integers(2),
    "train.lr": positive,
    "train.weight_decay": st.floats(0, allow_infinity=False, allow_nan=False),
    "train.pos_weight": positive | st.just("balanced"),
    "train.schedule": st.sampled_from(["constant", "cosine"]),
    "tune.early_stopping": st.sampled_from(["asha", "none"]),
    "evaluate.sensitivity": st.floats(0, 1, exclude_min=True),
    "cluster.use_gpu": st.booleans() | st.just("auto"),
    "cluster.max_failures": st.integers(-1),
    "tracking.entity": st.none() | st.text(),
}
changes = st.fixed_dictionaries({}, optional=CHANGES)


def leaves(model: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> FieldInfo of every setting below `model`."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


# --- the tree -------------------------------------------------------------------------------------


@given(changes)
def test_json_round_trip_gives_an_equal_tree_of_the_same_digest(values: dict[str, Any]) -> None:
    config = override(Config(), values)
    again = Config.model_validate_json(config.to_json())
    assert again == config
    assert again.digest() == config.digest()


@given(changes, st.sampled_from(sorted(CHANGES)), st.data())
def test_digest_changes_exactly_with_the_sections_that_it_covers(
    values: dict[str, Any], key: str, data: st.DataObject
) -> None:
    before = override(Config(), values)
    after = override(before, {key: data.draw(CHANGES[key])})
    section = key.split(".")[0]
    others = [name for name in Config.model_fields if name != section]
    assert (after.digest() == before.digest()) == (after == before)
    assert (after.digest(section) == before.digest(section)) == (after == before)
    assert after.digest(*others) == before.digest(*others)


def test_digest_does_not_depend_on_the_order_in_which_settings_were_given() -> None:
    one = Config.model_validate({"seed": 3, "train": {"lr": 0.1, "epochs": 2}})
    two = Config.model_validate({"train": {"epochs": 2, "lr": 0.1}, "seed": 3})
    assert one.digest() == two.digest()


def test_a_value_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("model", [Config, *(job.arguments for job in JOBS.values())])
def test_every_setting_has_a_meaning(model: type[Section]) -> None:
    fields = leaves(model)
    assert fields
    assert [key for key, field in fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**31),
        ("prepare.image_size", 31),
        ("prepare.samples_per_shard", 0),
        ("prepare.max_bad_fraction", 1.0),
        ("prepare.limit", 0),
        ("split.unit", "study"),
        ("split.val_fraction", 0.0),
        ("split.salt", -1),
        ("split.salt", 64),
        ("data.image_size", 1025),
        ("augment.rotation_degrees", float("nan")),
        ("augment.translation_fraction", 0.51),
        ("augment.scale_fraction", 0.9),
        ("model.backbone", "vgg16"),
        ("train.epochs", 0),
        ("train.batch_size", 1),
        ("train.lr", float("inf")),
        ("train.weight_decay", -1e-9),
        ("train.weight_decay", float("inf")),
        ("train.pos_weight", 0.0),
        ("train.pos_weight", "auto"),
        ("train.schedule", "linear"),
        ("train.precision", "float16"),
        ("evaluate.operating_point", "f1"),
        ("evaluate.sensitivity", 1.1),
        ("evaluate.bootstrap_resamples", 99),
        ("cluster.num_workers", 0),
        ("cluster.min_workers", 0),
        ("cluster.use_gpu", "maybe"),
        ("cluster.max_failures", -2),
        ("cluster.start_timeout_s", float("inf")),
        ("tracking.mode", "on"),
        ("tracking.project", "a/b"),
    ],
)
def test_a_bad_value_is_named_with_its_key_its_layer_and_what_is_allowed(
    key: str, value: object
) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), {key: value}, layer="the test")
    pattern = rf"{re.escape(key)}: got {re.escape(repr(value))} from the test, expected \S+"
    assert re.match(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"split.val_fraction": 0.5, "split.test_fraction": 0.5},
            r"^split: val_fraction \+ test_fraction must be below 1$",
        ),
        (
            {"tune.space": {"train.lr": ["log_uniform", 1.0, 0.003]}},
            r"^tune\.space: train\.lr: the low 1 is above the high 0\.003",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        override(Config(), values)


@pytest.mark.parametrize("job", ["prepare", "tune", "evaluate"])
def test_only_training_is_elastic(job: str) -> None:
    environ = {"PNEUMO_CLUSTER__NUM_WORKERS": "2", "PNEUMO_CLUSTER__MIN_WORKERS": "1"}
    with pytest.raises(ConfigError, match=rf"cluster\.min_workers: {job} is not elastic"):
        parse_command_line(job, NEEDED[job], environ)


def test_workers_of_a_trial_are_not_those_of_a_training() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers: .*tune\.workers_per_trial"):
        parse_command_line("tune", NEEDED["tune"], {"PNEUMO_CLUSTER__NUM_WORKERS": "2"})


def test_a_literal_lists_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'resnet18', 'resnet34', .* or 'efficientnet_v2_s'"):
        override(Config(), {"model.backbone": "resnet"})


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: .*; unknown setting train\.epoch "):
        override(Config(), {"train.lr": 0, "train.epoch": 3})


# --- override -------------------------------------------------------------------------------------


def test_override_changes_what_is_named_and_nothing_else() -> None:
    config = Config(seed=4)
    changed = override(config, {"train.lr": 0.5, "train.pos_weight": 2})
    assert (changed.train.lr, changed.train.pos_weight) == (0.5, 2.0)
    rest = {"train": changed.train.model_copy(update={"lr": 1e-4, "pos_weight": "balanced"})}
    assert changed.model_copy(update=rest) == config
    assert config.train.lr == 1e-4


@pytest.mark.parametrize("key", ["train.lrr", "trian.lr", "nope", "train.lr.low"])
def test_override_refuses_an_unknown_key(key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(".".join(key.split(".")[:2])[:5])):
        override(Config(), {key: 1e-3})


# --- layers ---------------------------------------------------------------------------------------


def test_flags_win_over_environment_over_recipe_over_defaults(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, "[train]\nlr = 0.1\nepochs = 11\nbatch_size = 12\n[data]\nimage_size = 96\n"
    )
    config = parse_command_line(
        "train",
        ["--store", "s", "--recipe", recipe, "--train.lr", "0.3"],
        {"PNEUMO_TRAIN__LR": "0.2", "PNEUMO_TRAIN__EPOCHS": "22", "PATH": "/bin"},
    ).config
    assert config.train.lr == 0.3
    assert config.train.epochs == 22
    assert config.train.batch_size == 12
    assert config.data.image_size == 96
    assert config.train.schedule == "constant"


def test_a_flag_that_repeats_the_default_still_wins_over_the_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "seed = 5\n[train]\nlr = 0.1\n")
    arguments = ["--store", "s", "--recipe", recipe, "--train.lr", "1e-4", "--seed=0"]
    config = parse_command_line("train", arguments, {}).config
    assert config == Config()


def test_arguments_are_no_configuration() -> None:
    one = parse_command_line("train", ["--store", "a"], {})
    two = parse_command_line("train", ["--store", "b", "--run", "r", "--debug"], {})
    assert isinstance(two.arguments, TrainArguments)
    assert (two.arguments.store, two.arguments.run, two.arguments.debug) == ("b", "r", True)
    assert one.config.digest() == two.config.digest() == Config().digest()


def test_toggles_are_off_until_given() -> None:
    arguments = parse_command_line("evaluate", NEEDED["evaluate"], {}).arguments
    assert isinstance(arguments, EvaluateArguments)
    assert not arguments.overwrite
    assert not arguments.debug


@pytest.mark.parametrize(("given", "meant"), [("true", True), ("max-autotune", "max-autotune")])
def test_a_network_is_compiled_in_two_ways(given: str, meant: object) -> None:
    flags = [*NEEDED["train"], "--train.compile", given]
    assert parse_command_line("train", flags, {}).config.train.compile == meant


def test_hash_key_and_revision_in_the_environment_are_no_settings() -> None:
    environ = {"PNEUMO_HASH_KEY": "secret", "PNEUMO_REVISION": "abc1234"}
    assert parse_command_line("train", NEEDED["train"], environ).config == Config()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"PNEUMO_TRAIN__LRR": "1"},
            r"unknown setting train\.lrr in the environment, did you mean train\.lr\?",
        ),
        ({"PNEUMO_TRAN__LR": "1"}, r"PNEUMO_TRAN__LR: no such setting; .*sections: seed, prepare"),
        ({"PNEUMO_SEED__LR": "1"}, r"PNEUMO_SEED__LR: no such setting"),
        ({"PNEUMO_TRAIN__LR": "fast"}, r"train\.lr: got 'fast' from the environment, expected a"),
        ({"PNEUMO_TRAIN": "{"}, r"the environment: .*\"train\".*PNEUMO_SECTION__KEY"),
        ({"PNEUMO_TRAIN": "3"}, r"train: got 3 from the environment"),
    ],
)
def test_a_mistake_in_the_environment_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command_line("train", NEEDED["train"], environ)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlrr = 1", r"unknown setting train\.lrr in recipe .*mine\.toml, did you mean"),
        ("[trian]\nlr = 1", r"unknown setting trian in recipe .*mine\.toml, did you mean train\?"),
        (
            "[x]\ny = 1",
            r"unknown setting x in recipe .*mine\.toml, allowed: seed, prepare, .*model",
        ),
        ("[train]\nlr = 'a'", r"train\.lr: got 'a' from recipe .*mine\.toml, expected"),
        ("train = 3", r"train: got 3 from recipe"),
        ("train.lr =", r"recipe .*mine\.toml: not valid TOML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    recipe = write_recipe(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        parse_command_line("train", [*NEEDED["train"], "--recipe", recipe], {})


@pytest.mark.parametrize("name", ["fats", "../__init__", "/absent/mine.toml"])
def test_an_absent_recipe_lists_the_shipped_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe {name}: not found; .*{', '.join(RECIPES)}"):
        read_recipe(name)


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (
            "train",
            ["--train.lrr", "1"],
            r"unknown setting --train\.lrr, did you mean --train\.lr\?",
        ),
        ("train", ["--sead", "1"], r"unknown setting --sead, did you mean --seed\?"),
        ("train", ["--train.zzz=1"], r"--train\.zzz, allowed: --train\.epochs, .*--train\.lr"),
        ("train", ["--train.lr", "-1"], r"train\.lr: got '-1' from the command line, expected gre"),
        (
            "train",
            ["--train.lr"],
            r"argument --train\.lr: expected one argument.*jobs\.train --hel",
        ),
        ("train", ["stray"], r"unknown setting stray"),
        ("train", ["--train.epoch", "3"], r"did you mean --train\.epochs\?"),
    ],
)
def test_a_mistake_in_the_flags_is_named(job: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command_line(job, [*NEEDED[job], *flags], {})


@pytest.mark.parametrize("job", JOBS)
def test_flags_without_effect_on_a_job_are_refused(job: str) -> None:
    for key in leaves(Config):
        if key.split(".")[0] not in JOBS[job].sections:
            flag = f"--{key.replace('_', '-')}"
            with pytest.raises(ConfigError, match=f"unknown setting {flag}"):
                parse_command_line(job, [*NEEDED[job], flag, "1"], {})


@pytest.mark.parametrize("job", JOBS)
def test_a_missing_argument_is_named(job: str) -> None:
    first, *others = NEEDED[job]
    with pytest.raises(ConfigError, match=f"{first} is required"):
        parse_command_line(job, others[1:], {})


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_setting_of_the_job_with_default_and_meaning(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as left:
        parse_command_line(job, ["--help"], {})
    assert left.value.code == 0
    entries = re.split(r"\n\s*(?=--|\n)", capsys.readouterr().out)
    lines = [" ".join(entry.split()) for entry in entries]
    relevant = {k: f for k, f in leaves(Config).items() if k.split(".")[0] in JOBS[job].sections}
    for key, field in (relevant | leaves(JOBS[job].arguments)).items():
        flag = f"--{key.replace('_', '-')}"
        [line] = [line for line in lines if line.split(" ")[0] == flag]
        assert " ".join(field.description.split()) in line
        if key in relevant:
            assert line.endswith(f"(default: {field.default})")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_recipe_holds_differences_from_the_defaults_only(recipe: str) -> None:
    tree = read_recipe(recipe)
    config = parse_command_line("train", [*NEEDED["train"], "--recipe", recipe], {}).config
    assert config == Config.model_validate(tree)
    assert config != Config()


def test_a_configuration_error_is_the_users_mistake() -> None:
    assert issubclass(ConfigError, UserError)
    assert ConfigError.exit_code == 2


def test_others_are_told_no_folder_of_this_machine() -> None:
    config = override(
        Config(),
        {
            "model.weights": "/home/alice/enc.pt",
            "data.cache_dir": "~/secret/blocks",
            "split.list": "file:///home/alice/split.csv",
            "tune.space": {
                "model.weights": ["choice", "random", "/home/alice/b.pt", "s3://b/c.pt"]
            },
        },
    )
    told = config.for_others()
    assert told["model"]["weights"] == "enc.pt"
    assert told["data"]["cache_dir"] == "blocks"
    assert told["split"]["list"] == "split.csv"
    assert told["tune"]["space"]["model.weights"] == ["choice", "random", "b.pt", "s3://b/c.pt"]
    assert "alice" not in json.dumps(told)
    assert Config().for_others() == Config().model_dump(mode="json")
