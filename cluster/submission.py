"""What is asked of a cluster: a job's command line, checked here, that means the same over there.

Pure: takes the flags, the environment and the time as values, and asks no cluster.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.targets import is_remote
from pneumo.command_line import JOBS, Invocation, PrepareArguments, parse_command_line
from pneumo.config import WEIGHTS_WITHOUT_FILE, ClusterConfig, Config, Section
from pneumo.config_layers import ENVIRONMENT_PREFIX, check_batch_size, override, read_recipe
from pneumo.errors import ConfigError
from pneumo.search_space import flatten

RECIPE_FOLDER = "sent"
"""Where a recipe of the laptop lies in the package that is sent."""

HASH_KEY = "PNEUMO_HASH_KEY"
"""Undoes the pseudonyms of a store, so no job gets it that reads no source."""
STORAGE_VARIABLES = frozenset(
    {
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION",
        "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_MAX_ATTEMPTS",
        "AWS_RETRY_MODE", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION",
        "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT",
    }
)  # fmt: skip
TRACKING_VARIABLES = frozenset(
    {
        "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_MODE",
        "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_NOTES", "WANDB_SILENT",
    }
)  # fmt: skip
"""What of AWS_* and WANDB_* goes to a remote cluster; the others name files, services or a role
of this machine. RAY_* never goes: the cluster has its own."""

_PLACES = ("source", "store", "external", "run", "members", "compare_with", "output")
"""Arguments that name places; whichever a job has. It writes the last of those in `_WRITTEN`."""
_HASHES = ("prepare",)
"""The jobs that derive keys of studies and patients."""
_WRITTEN = ("store", "run", "output")
_Places = Mapping[str, Sequence[str]]
"""The URLs that each argument or setting names, absolute."""
_SECRET_LIKE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


@dataclass(frozen=True)
class Submission:
    """A job as a cluster is asked to run it.

    `id` is the same for the same job and the same place that it writes (for most a run), so that
    submitting twice does not run twice; `settings` is a digest of all that was asked. `preflight`
    is the command that looks whether the cluster reaches `places` and has the secrets that the job
    cannot do without; `shape` what the job takes of the cluster (a trial, for tune), None where it
    takes whatever there is. `config` are the settings, their files as the job will name them.
    """

    job: str
    id: str
    entrypoint: str
    target: str
    settings: str
    config: Config = field(default_factory=Config, repr=False)
    places: tuple[str, ...] = ()
    preflight: str = ""
    shape: ClusterConfig | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    recipe: Path | None = None
    warnings: tuple[str, ...] = ()
    owner: str = ""
    """Whose job it is: only its owner's `down` cancels it."""

    @property
    def derives_keys(self) -> bool:
        """Whether it needs the secret behind the keys of studies and patients."""
        return self.job in _HASHES

    @property
    def secrets(self) -> tuple[str, ...]:
        """Variables of `environment` whose names say that they are secrets."""
        return tuple(name for name in self.environment if _SECRET_LIKE.search(name))


def plan(
    job: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    remote: bool,
    now: datetime,
    sends_files: bool = True,
) -> Submission:
    """The submission that `python -m jobs.<job> argv` amounts to.

    Local places become absolute, for the job starts in another folder. A recipe that is a file of
    this machine travels with the code, or, where no files are sent, as environment variables: what
    else is set outranks them as it outranks a recipe. Raises ConfigError for whatever the job
    itself would refuse.
    """
    invocation = parse_command_line(job, argv, environ)
    if job == "train":
        train, cluster = invocation.config.train, invocation.config.cluster
        check_batch_size(train.batch_size, train.micro_batch_size, cluster.num_workers)
    places = _places(invocation, remote=remote, now=now)
    recipe = _local_recipe(invocation)
    flags = [text for name, urls in places.items() for text in (f"--{name}", ",".join(urls))]
    replaced = {f"--{name}" for name in places}
    if recipe is not None:
        replaced.add("--recipe")
        if sends_files:
            flags += ["--recipe", f"{RECIPE_FOLDER}/{recipe.name}"]
        else:
            environ = {**recipe_environment(read_recipe(str(recipe))), **environ}
    (target,) = places[_written(places)]
    sent, kept = split_environment(job, environ, remote=remote)
    there = [*flags, *_without(argv, replaced)]
    if recipe is not None and not sends_files:
        _check_same(invocation, parse_command_line(job, there, sent), places)
    return Submission(
        job=job,
        id=submission_id(job, target),
        entrypoint=shlex.join(["python", "-m", JOBS[job].module, *there]),
        target=target,
        settings=_settings_digest(invocation, places),
        config=_with_files(invocation, places),
        places=tuple(url for urls in places.values() for url in urls),
        preflight=_preflight(places, _needs(invocation, environ)),
        shape=_shape(invocation),
        environment=sent,
        recipe=recipe if sends_files else None,
        warnings=(*invocation.warnings, *(_warnings(places, sent, kept) if remote else ())),
    )


def submission_id(job: str, target: str) -> str:
    """`<job>-<name of the run or store>-<8 hex digits>`: at most 43 characters of a-z, 0-9 and '-'.

    Short enough for a RayJob, whose name may have 47.
    """
    name = re.sub(r"[^a-z0-9]+", "-", target.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")
    digest = hashlib.sha256(f"{job} {target}".encode()).hexdigest()[:8]
    return "-".join(part for part in (job, name[:24].strip("-"), digest) if part)


def split_environment(
    job: str, environ: Mapping[str, str], *, remote: bool
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The variables that a job gets, and the names of those of AWS and of W&B, if it is tracked,
    that stay here."""
    prefixes = ["AWS_", *(["WANDB_"] if "tracking" in JOBS[job].sections else [])]
    settings = {k for k in environ if k.startswith("PNEUMO_") and (k != HASH_KEY or job in _HASHES)}
    others = {k for k in environ if k.startswith(tuple(prefixes))}
    others -= {"AWS_EC2_METADATA_DISABLED", "AWS_PAGER"} if remote else set()  # nobody misses them
    going = others & (STORAGE_VARIABLES | TRACKING_VARIABLES) if remote else others
    sent = {name: environ[name] for name in sorted(settings | going)}
    return sent, tuple(sorted(others - going))


def recipe_environment(
    settings: Mapping[str, Any],
    section: type[Section] = Config,
    prefix: str = ENVIRONMENT_PREFIX,
) -> dict[str, str]:
    """A recipe's settings as the environment variables that mean the same; what is no plain value,
    as a search's space, is one variable of JSON."""
    variables: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key.upper()}"
        below = section.model_fields[key].annotation
        if isinstance(below, type) and issubclass(below, Section):
            variables |= recipe_environment(value, below, f"{name}__")
        else:
            plain = not isinstance(value, Mapping | list)
            variables[name] = str(value) if plain else json.dumps(value)
    return variables


def _check_same(here: Invocation, there: Invocation, places: _Places) -> None:
    """Raise ConfigError where a recipe sent as variables means something else: a table that a
    recipe and a variable both fill is merged here, and replaced there."""
    wanted = flatten(_with_files(here, places).model_dump())
    found = flatten(there.config.model_dump())
    changed = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: set by the recipe and by a variable, which cannot both be "
            "sent; write it in the recipe alone"
        )


def _with_files(invocation: Invocation, places: _Places) -> Config:
    """The settings, with absolute paths of the files that they name."""
    files = {name: places[name][0] for name in _files_of_settings(invocation)}
    return override(invocation.config, files, "the places")


def _places(invocation: Invocation, *, remote: bool, now: datetime) -> _Places:
    arguments = invocation.arguments.model_dump()
    if arguments.get("source") == "-":
        raise ConfigError(
            "--source -: a list on standard input does not go to a cluster; give URLs"
        )
    if "run" in arguments and arguments["run"] is None:
        if remote:
            raise ConfigError(
                f"{invocation.job}: --run is required on a remote cluster, whose own folders go "
                f"with it; give a URL that outlives it, such as s3://bucket/runs/{invocation.job}-1"
            )
        arguments["run"] = f"runs/{invocation.job}-{now:%Y%m%d-%H%M%S}"
    given = {name.replace("_", "-"): arguments[name] for name in _PLACES if arguments.get(name)}
    given |= _files_of_settings(invocation)
    return {
        name: [_absolute(url) for url in (value if isinstance(value, list) else [value])]
        for name, value in given.items()
    }


def _files_of_settings(invocation: Invocation) -> dict[str, str]:
    """The settings that name a file, wherever they were set."""
    sections, config = JOBS[invocation.job].sections, invocation.config
    found = {}
    if "split" in sections and config.split.list is not None:
        found["split.list"] = config.split.list
    if "model" in sections and config.model.weights not in WEIGHTS_WITHOUT_FILE:
        found["model.weights"] = config.model.weights
    return found


def _needs(invocation: Invocation, environ: Mapping[str, str]) -> list[str]:
    """The secrets without which the job fails, or does something else than here."""
    needs = []
    arguments = invocation.arguments
    if isinstance(arguments, PrepareArguments):
        far = "://" in arguments.source and not arguments.source.startswith("file://")
        if far or environ.get(HASH_KEY):
            needs.append(HASH_KEY)
    is_tracked = "tracking" in JOBS[invocation.job].sections
    # The more private of the two holds, as in pneumo.reporting.tracking.
    is_private = environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if is_tracked and invocation.config.tracking.mode == "online" and not is_private:
        needs.append("WANDB_API_KEY")
    return needs


def _shape(invocation: Invocation) -> ClusterConfig | None:
    """What the job takes of the cluster; of a search, what a trial takes."""
    config = invocation.config
    if "cluster" not in JOBS[invocation.job].sections:
        return None
    if invocation.job != "tune":
        return config.cluster
    return config.cluster.model_copy(update={"num_workers": config.tune.workers_per_trial})


def _written(places: _Places) -> str:
    """The argument that names where the job writes."""
    return [name for name in _WRITTEN if name in places][-1]


def _preflight(places: _Places, needs: Sequence[str]) -> str:
    written = _written(places)
    flags = [
        text
        for name, urls in places.items()
        for url in urls
        for text in ("--writes" if name == written else "--reads", url)
    ]
    needed = [text for name in needs for text in ("--needs", name)]
    return shlex.join(["python", "-m", "jobs.preflight", *flags, *needed])


def _absolute(url: str) -> str:
    if "://" in url and not url.startswith("file://"):
        return url.rstrip("/")
    return str(Path(url.removeprefix("file://")).expanduser().absolute())


def _local_recipe(invocation: Invocation) -> Path | None:
    name = invocation.arguments.recipe
    if name is None or not name.endswith(".toml"):
        return None
    url = _absolute(name)
    return None if "://" in url else Path(url)


def _without(argv: Sequence[str], flags: set[str]) -> list[str]:
    """`argv` without `flags` and their values, in either form: `--run X` and `--run=X`."""
    rest: list[str] = []
    skip = False
    for text in argv:
        if not skip and text.split("=", 1)[0] not in flags:
            rest.append(text)
        skip = not skip and text in flags
    return rest


def _settings_digest(invocation: Invocation, places: _Places) -> str:
    others = invocation.arguments.model_dump(exclude={*_PLACES, "recipe", "debug"})
    joined = {name: ",".join(urls) for name, urls in places.items()}
    content = json.dumps([joined, others, invocation.config.digest()], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _warnings(places: _Places, sent: Mapping[str, str], kept: tuple[str, ...]) -> tuple[str, ...]:
    warnings = []
    local = [f"--{name} {url}" for name, urls in places.items() for url in urls if "://" not in url]
    if local:
        warnings.append(
            f"{', '.join(local)}: no URL, so it must exist under this path on every node of the "
            "cluster; an s3:// URL needs no such care"
        )
    if kept:
        warnings.append(
            f"not sent, for they are this machine's: {', '.join(kept)}; the cluster needs "
            "credentials of its own, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from here"
        )
    endpoints = [k for k, v in sent.items() if "://" in v and not is_remote(v)]
    if endpoints:
        warnings.append(f"{', '.join(endpoints)}: names this machine; the cluster cannot reach it")
    return tuple(warnings)
