"""Four layers make one checked invocation; a mistake in any of them is one line."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from pneumo.command_line import JOBS, EvaluateArguments, TrainArguments, parse_command_line
from pneumo.config import Config, Section
from pneumo.config_layers import read_recipe
from pneumo.errors import ConfigError

NEEDED = {
    "prepare": ["--source", "in", "--store", "out"],
    "train": ["--store", "s"],
    "tune": ["--store", "s"],
    "evaluate": ["--store", "s", "--run", "r"],
    "predict": ["--source", "in", "--run", "r", "--output", "out"],
    "export": ["--run", "r", "--output", "out"],
    "track": ["--run", "r"],
}
RECIPES = sorted(
    entry.name.removesuffix(".toml")
    for entry in (resources.files("jobs") / "recipes").iterdir()
    if entry.name.endswith(".toml")
)


def fields_of(model: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> FieldInfo of every setting below `model`."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= fields_of(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def write_recipe(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("model", [Config, *(job.arguments for job in JOBS.values())])
def test_every_setting_has_a_meaning(model: type[Section]) -> None:
    fields = fields_of(model)
    assert fields
    assert [key for key, field in fields.items() if not field.description] == []


@pytest.mark.parametrize("job", ["prepare", "tune", "evaluate"])
def test_only_training_is_elastic(job: str) -> None:
    environ = {"PNEUMO_CLUSTER__NUM_WORKERS": "2", "PNEUMO_CLUSTER__MIN_WORKERS": "1"}
    with pytest.raises(ConfigError, match=rf"cluster\.min_workers: {job} is not elastic"):
        parse_command_line(job, NEEDED[job], environ)


def test_workers_of_a_trial_are_not_those_of_a_training() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_workers: .*tune\.workers_per_trial"):
        parse_command_line("tune", NEEDED["tune"], {"PNEUMO_CLUSTER__NUM_WORKERS": "2"})


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
    assert (two.arguments.store, two.arguments.run, two.arguments.debug) == (["b"], "r", True)
    assert one.config.digest() == two.config.digest() == Config().digest()


def test_none_is_a_value_of_what_may_be_none(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[train]\npatience = 3\nclip_norm = 1.0\n")
    argv = [*NEEDED["tune"], "--recipe", str(recipe), "--train.patience", "none"]
    argv += ["--tune.early-stopping", "none"]
    config = parse_command_line("tune", argv, {"PNEUMO_TRAIN__CLIP_NORM": "none"}).config
    assert (config.train.patience, config.train.clip_norm) == (None, None)
    assert config.tune.early_stopping == "none"
    assert parse_command_line("train", [*NEEDED["train"], "--train.patience", "None"], {})
    with pytest.raises(ConfigError, match=r"train\.epochs: got 'none'"):
        parse_command_line("train", [*NEEDED["train"], "--train.epochs", "none"], {})


def test_toggles_are_off_until_given() -> None:
    arguments = parse_command_line("evaluate", NEEDED["evaluate"], {}).arguments
    assert isinstance(arguments, EvaluateArguments)
    assert not arguments.overwrite
    assert not arguments.debug


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
        ({"pneumo_trian__lr": "1"}, r"pneumo_trian__lr: no such setting"),
        ({"PNEUMO_PREPARE__POSITIVE": "A,B"}, r"""a list, .*as JSON: '\["A", "B"\]'"""),
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
        ("train.epochs = true", r"train\.epochs: got 'true' from recipe"),
        ("train.clip_norm = false", r"train\.clip_norm: got 'false' from recipe"),
        ("tracking.group = true", r"tracking\.group: got True from recipe"),
        ("train.lr =", r"recipe .*mine\.toml: not valid TOML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    recipe = write_recipe(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        parse_command_line("train", [*NEEDED["train"], "--recipe", recipe], {})


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
        ("train", ["--run", ""], r"run: got '' from the command line, expected at least 1 char"),
        ("evaluate", ["--external", "a,,b"], r"external: got '' from the command line, expected"),
        ("train", ["--data.readers", "2"], r"unknown setting --data\.readers, which was removed"),
        ("train", ["--train.epoch", "3"], r"did you mean --train\.epochs\?"),
        ("train", ["--recipe", "fast", "--recipe=gpu"], r"--recipe: given 2 times; leave one"),
        ("train", ["--train.pos-weight=1"] * 3, r"--train\.pos-weight: given 3 times"),
        ("evaluate", ["--store", "t"], r"--store: given 2 times"),
        ("tune", ["--tune.space", "3"], r"the command line: .*tune\.space.*jobs\.tune --help"),
        ("tune", ["--tune.space", '{"train.lr":'], r"the command line: .*tune\.space"),
    ],
)
def test_a_mistake_in_the_flags_is_named(job: str, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_command_line(job, [*NEEDED[job], *flags], {})


def test_a_list_may_be_given_in_parts() -> None:
    argv = [*NEEDED["evaluate"], "--members", "a", "--members", "b"]
    arguments = parse_command_line("evaluate", argv, {}).arguments
    assert isinstance(arguments, EvaluateArguments)
    assert arguments.members == ["a", "b"]


def test_a_flag_of_what_is_searched_is_told_but_not_a_recipes_setting() -> None:
    argv = [*NEEDED["tune"], "--recipe", "fast", "--train.pos-weight", "2", "--seed", "3"]
    (told,) = parse_command_line("tune", argv, {}).warnings
    assert told.startswith("train.pos_weight: its flag has no effect, as tune.space")


def test_a_later_search_space_replaces_an_earlier_one() -> None:
    space = ["--tune.space", '{"train.lr": ["uniform", 1e-4, 1e-3]}']
    argv = [*NEEDED["tune"], "--recipe", "fast", *space]
    assert list(parse_command_line("tune", argv, {}).config.tune.space) == ["train.lr"]


@pytest.mark.parametrize("job", JOBS)
def test_flags_without_effect_on_a_job_are_refused(job: str) -> None:
    for key in fields_of(Config):
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
    relevant = {k: f for k, f in fields_of(Config).items() if k.split(".")[0] in JOBS[job].sections}
    for key, field in (relevant | fields_of(JOBS[job].arguments)).items():
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
