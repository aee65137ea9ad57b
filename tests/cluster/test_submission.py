"""What is asked of a cluster: pure, no cluster needed."""

import shlex
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster.submission import Submission, plan, split_environment, submission_id
from cluster.targets import is_remote
from pneumo.command_line import JOBS, parse_command_line
from pneumo.errors import ConfigError

NOW = datetime(2026, 1, 2, 3, 4, 5)


def _plan(
    command: str, environ: Mapping[str, str] | None = None, *, remote: bool = False
) -> Submission:
    job, *argv = shlex.split(command)
    return plan(job, argv, environ or {}, remote=remote, now=NOW)


def test_the_entrypoint_means_the_same_on_the_cluster() -> None:
    asked = "--train.lr=3e-4 --tracking.group 'a b;$(c)' --store s3://b/store --run s3://b/runs/1/"
    submission = _plan(f"train {asked}")
    python, dash_m, module, *flags = shlex.split(submission.entrypoint)
    assert [python, dash_m, module] == ["python", "-m", "jobs.train"]
    over_there = parse_command_line("train", flags, {})
    assert over_there.config == parse_command_line("train", shlex.split(asked), {}).config
    assert over_there.arguments.model_dump()["run"] == "s3://b/runs/1"
    assert "'a b;$(c)'" in submission.entrypoint


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_a_place_that_it_writes(job: str) -> None:
    flags = {"source": "/in", "store": "/store", "run": "/runs/1", "output": "/out"}
    fields = JOBS[job].arguments.model_fields
    command = " ".join(f"--{name} {value}" for name, value in flags.items() if name in fields)
    submission = _plan(f"{job} {command}")
    written = {"prepare": "/store", "predict": "/out", "export": "/out"}
    assert submission.target == written.get(job, "/runs/1")
    given = [url for name, url in flags.items() if name in fields]
    assert sorted(submission.places) == sorted(given)
    python, dash_m, module, *checks = shlex.split(submission.preflight)
    assert (python, dash_m, module) == ("python", "-m", "jobs.preflight")
    pairs = dict(zip(checks[1::2], checks[::2], strict=True))
    assert pairs == {
        url: "--writes" if url == submission.target else "--reads" for url in submission.places
    }


def test_the_runs_of_an_ensemble_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "evaluate --store s3://b/s --run a --members b,s3://b/c --members=d"
    submission = _plan(flags)
    assert submission.entrypoint == (
        f"python -m jobs.evaluate --store s3://b/s --run {tmp_path}/a "
        f"--members {tmp_path}/b,s3://b/c,{tmp_path}/d"
    )


def test_a_run_to_compare_with_and_files_of_settings_are_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compared = _plan("evaluate --store s3://b/s --run s3://b/r --compare-with old --evaluate.tta 3")
    assert compared.entrypoint.endswith(
        f"--run s3://b/r --compare-with {tmp_path}/old --evaluate.tta 3"
    )
    assert f"--reads {tmp_path}/old" in compared.preflight
    listed = _plan("prepare --source raw --store s --split.list=who.csv")
    assert listed.entrypoint.endswith(f"--split.list {tmp_path}/who.csv")
    assert listed.places == (f"{tmp_path}/raw", f"{tmp_path}/s", f"{tmp_path}/who.csv")
    assert listed.target == f"{tmp_path}/s"
    without = _plan("prepare --source raw --store s --prepare.without=mine,s3://b/x --seed 1")
    assert without.entrypoint.endswith(f"--prepare.without {tmp_path}/mine,s3://b/x --seed 1")
    assert without.config.prepare.without == [f"{tmp_path}/mine", "s3://b/x"]
    assert f"--reads {tmp_path}/mine --reads s3://b/x" in without.preflight
    weights = _plan("train --store /s --run /r", {"PNEUMO_MODEL__WEIGHTS": "mine.pt"})
    assert weights.entrypoint.endswith(f"--model.weights {tmp_path}/mine.pt")
    assert "model.weights" not in _plan("train --store /s --run /r --recipe fast").entrypoint


def test_a_file_in_a_recipe_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('[split]\nlist = "who.csv"\n')
    submission = _plan("prepare --source /raw --store /s --recipe mine.toml")
    assert f"--split.list {tmp_path}/who.csv" in submission.entrypoint


def test_a_search_takes_what_a_trial_takes() -> None:
    resources = _plan("tune --store /s --run /r --tune.workers-per-trial 4").resources
    assert resources is not None
    assert resources.num_workers == 4
    train = _plan("train --store /s --run /r --cluster.num-workers 3").resources
    assert train is not None
    assert train.num_workers == 3
    assert _plan("prepare --source /raw --store /s").resources is None


@pytest.mark.parametrize(
    ("command", "environ", "needs"),
    [
        ("prepare --source s3://b/raw --store /s", {}, ["PNEUMO_HASH_KEY"]),
        ("prepare --source /raw --store /s", {}, []),
        ("prepare --source /raw --store /s", {"PNEUMO_HASH_KEY": "x"}, ["PNEUMO_HASH_KEY"]),
        ("train --store /s --run /r", {"PNEUMO_HASH_KEY": "x", "WANDB_API_KEY": "x"}, []),
        ("train --store /s --run /r --tracking.mode online", {}, ["WANDB_API_KEY"]),
        ("train --store /s --run /r --tracking.mode online", {"WANDB_MODE": "offline"}, []),
    ],
)
def test_the_secrets_that_a_job_cannot_do_without_are_asked_for(
    command: str, environ: dict[str, str], needs: list[str]
) -> None:
    words = shlex.split(_plan(command, environ).preflight)
    assert [after for flag, after in pairwise(words) if flag == "--needs"] == needs


def test_local_places_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    submission = _plan("prepare --source raw --store=out/store --prepare.limit 3")
    assert submission.entrypoint == (
        f"python -m jobs.prepare --source {tmp_path}/raw --store {tmp_path}/out/store "
        "--prepare.limit 3"
    )


def test_a_run_without_a_name_gets_one_on_this_machine() -> None:
    assert _plan("train --store /s").target.endswith("/runs/train-20260102-030405")


def test_a_remote_run_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"--run is required on a remote cluster.*s3://bucket"):
        _plan("train --store s3://b/s", remote=True)


def test_a_recipe_of_this_machine_travels(tmp_path: Path) -> None:
    recipe = tmp_path / "best.toml"
    recipe.write_text("[train]\nlr = 2e-4\n")
    submission = _plan(f"train --store /s --run /r --recipe {recipe}")
    assert submission.environment == {"PNEUMO_TRAIN": '{"lr": 0.0002}'}
    assert submission.entrypoint.endswith("--store /s --run /r")


def test_a_named_recipe_and_one_in_a_bucket_stay_where_they_are() -> None:
    submission = _plan("train --store /s --run /r --recipe fast")
    assert submission.environment == {}
    assert submission.entrypoint.endswith("--recipe fast")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --store /s --train.lr -1", "train.lr: got '-1'"),
        ("train --store /s --train.epochz 1", "did you mean --train.epochs"),
        ("train", "--store is required"),
        ("train --store /s --recipe /nowhere.toml", "recipe /nowhere.toml: not found"),
    ],
)
def test_what_the_job_would_refuse_is_refused_here(command: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _plan(command)


def test_the_id_belongs_to_job_and_place() -> None:
    base = _plan("train --store /s --run /runs/1").id
    assert base == _plan("train --run=/runs/1 --store /other --train.lr 1").id
    assert base != _plan("evaluate --store /s --run /runs/1").id
    assert base != _plan("train --store /s --run /runs/2").id
    assert base.startswith("train-1-")


@pytest.mark.parametrize("target", ["s3://b/" + "Long_Name." * 20, "/", "s3://b/run 1;x", "/ä"])
def test_ids_fit_a_rayjob_name(target: str) -> None:
    for job in JOBS:
        name = submission_id(job, target)
        assert len(name) <= 43
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_settings_tell_two_submissions_apart() -> None:
    first = _plan("train --store /s --run /r --train.lr 1e-3")
    assert first.settings == _plan("train --train.lr=0.001 --run /r --store /s").settings
    by_environment = _plan("train --store /s --run /r", {"pneumo_train__lr": "1e-3"})
    assert first.settings == by_environment.settings
    assert by_environment.environment == {"pneumo_train__lr": "1e-3"}
    assert first.settings != _plan("train --store /s --run /r --train.lr 1e-4").settings
    assert first.settings != _plan("train --store /s2 --run /r --train.lr 1e-3").settings


def test_a_job_gets_the_variables_that_it_needs_and_none_is_shown() -> None:
    environ = {
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "WANDB_API_KEY": "hidden",
        "PNEUMO_HASH_KEY": "hidden",
        "RAY_AUTH_TOKEN": "hidden",
        "HOME": "/home/x",
    }
    storage = {"AWS_SECRET_ACCESS_KEY"}
    gets = {
        "train --store /s --run /r": storage | {"WANDB_API_KEY"},
        "prepare --source /i --store /s": storage | {"PNEUMO_HASH_KEY"},
        "predict --source /i --run /r --output /o": storage,
    }
    for command, names in gets.items():
        submission = _plan(command, environ)
        assert set(submission.environment) == names
        assert "hidden" not in repr(submission)


def test_what_names_files_of_this_machine_stays_here() -> None:
    environ = {
        "AWS_PROFILE": "me",
        "AWS_REGION": "eu-central-1",
        "AWS_ROLE_ARN": "arn:aws:iam::0:role/of-the-laptop",
        "WANDB_DIR": "/x",
    }
    assert split_environment("train", environ, remote=False) == (environ, ())
    assert split_environment("train", environ, remote=True) == (
        {"AWS_REGION": "eu-central-1"},
        ("AWS_PROFILE", "AWS_ROLE_ARN", "WANDB_DIR"),
    )


def test_a_remote_cluster_is_warned_of_what_it_cannot_reach() -> None:
    environ = {"AWS_PROFILE": "me", "AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}
    submission = _plan("train --store /data/s --run s3://b/r", environ, remote=True)
    local, kept, endpoint = submission.warnings
    assert local.startswith("--store /data/s: no URL")
    assert "AWS_PROFILE" in kept
    assert endpoint.startswith("AWS_ENDPOINT_URL: names this machine")
    assert _plan("train --store /data/s --run s3://b/r", environ).warnings == ()
    assert _plan("train --store s3://b/s --run s3://b/r", remote=True).warnings == ()


@pytest.mark.parametrize(
    ("address", "remote"),
    [
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("http://[::1]:8265", False),
        ("http://10.0.0.7:8265", True),
        ("https://ray.example.org", True),
    ],
)
def test_loopback_is_this_machine(address: str, *, remote: bool) -> None:
    assert is_remote(address) is remote


_RECIPES = {
    "plain": "seed = 3\n[train]\nlr = 2e-4\nepochs = 3\ncompile = true\n",
    "a space": (
        '[tune.space]\ntrain.lr = ["log_uniform", 1e-5, 3e-3]\nmodel.backbone = "resnet34"\n'
    ),
    "choices": (
        '[tune]\nalgorithm = "grid"\n[tune.space]\n'
        'model.backbone = ["choice", "resnet18", "resnet34"]\n"train.lr" = ["uniform", 0.1, 1, 3]\n'
    ),
}


_VARIABLES = {
    "none": {},
    "a setting": {"PNEUMO_TRAIN__LR": "1e-3"},
    "a seed": {"PNEUMO_SEED": "7"},
    "a section": {"PNEUMO_TRAIN": '{"lr": 1e-3, "patience": null}'},
    "a section in small letters": {"pneumo_train": '{"lr": 1e-3}', "pneumo_tune": "{}"},
    "a space": {"PNEUMO_TUNE__SPACE": '{"train.weight_decay": ["choice", 0, 0.1]}'},
}


@pytest.mark.parametrize("environ", _VARIABLES.values(), ids=_VARIABLES)
@pytest.mark.parametrize("recipe", _RECIPES)
@pytest.mark.parametrize("job", ["train", "tune"])
def test_recipe_and_settings_arrive(
    job: str, recipe: str, environ: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(_RECIPES[recipe])
    asked = f"--store s3://b/s --run s3://b/r --recipe {path} --train.batch-size 32"
    submission = _plan(f"{job} {asked}", environ, remote=True)
    assert "--recipe" not in submission.entrypoint
    words = shlex.split(submission.entrypoint)[3:]
    there = parse_command_line(job, words, submission.environment)
    assert there.config == parse_command_line(job, shlex.split(asked), environ).config


def test_what_is_no_address_is_told() -> None:
    for nothing in ("http://[::1:8265", "http://[x"):
        with pytest.raises(ConfigError, match="is no address"):
            is_remote(nothing)


def test_a_recipe_from_elsewhere_is_asked_where_results_go(tmp_path: Path) -> None:
    text = '[tracking]\nentity = "somebody"\n[model]\nweights = "s3://other/weights.pt"\n'
    with MemoryFileSystem().open("/recipes/theirs.toml", "w") as recipe:
        recipe.write(text)
    command = "train --store s3://b/s --run s3://b/r --recipe"
    told = _plan(f"{command} memory://recipes/theirs.toml").warnings
    assert told == (
        "recipe memory://recipes/theirs.toml: it sets tracking.entity = somebody",
        "recipe memory://recipes/theirs.toml: it sets model.weights = s3://other/weights.pt",
    )
    (tmp_path / "own.toml").write_text(text)
    assert _plan(f"{command} {tmp_path}/own.toml").warnings == ()


def test_every_external_store_is_a_place_that_is_looked_at() -> None:
    submission = _plan("evaluate --store s3://b/s --run s3://b/r --external s3://b/x,/data/y")
    assert {"s3://b/x", "/data/y"} <= set(submission.places)
    assert "--reads s3://b/x --reads /data/y" in submission.preflight


def test_a_list_on_standard_input_stays_here() -> None:
    with pytest.raises(ConfigError, match="cannot be sent to a cluster"):
        _plan("predict --source - --run s3://b/r --output s3://b/o")
