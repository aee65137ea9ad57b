"""A job to submit: its command line, checked here and rewritten to mean the same on the cluster.

Pure: takes flags, environment and time as values, and contacts no cluster.
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
from pneumo import storage
from pneumo.command_line import JOBS, Invocation, PrepareArguments, parse_command_line
from pneumo.config import WEIGHTS_WITHOUT_FILE, ClusterConfig, Config
from pneumo.config_layers import (
    ENVIRONMENT_PREFIX,
    check_batch_size,
    merge,
    override,
    read_environment,
    read_recipe,
)
from pneumo.errors import ConfigError

HASH_KEY = "PNEUMO_HASH_KEY"
"""The secret that could undo a store's pseudonyms; only `prepare`, which derives keys, gets it."""
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
"""Only these AWS_* and WANDB_* variables are sent to a remote cluster; the others name files,
services or a role of this machine. RAY_* is never sent: the cluster has its own."""

_PLACES = ("source", "store", "external", "run", "members", "compare_with", "output")
"""Arguments that name places (URLs or paths). A job writes to the last one in `_OUTPUTS`."""
_OUTPUTS = ("store", "run", "output")
_Places = Mapping[str, Sequence[str]]
"""The absolute URLs that each argument or setting names."""
_SECRET_LIKE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")


@dataclass(frozen=True)
class Submission:
    """A job to submit.

    `id` depends only on the job and on `target`, the URL that it writes to (mostly a run), so that
    a job submitted twice runs once; `settings` is a digest of all arguments and settings.
    `submitted` is the time, as YYYYmmdd-HHMMSS: attempts at one submission share it.
    `preflight` is the command that checks whether the cluster reaches `places` and has the secrets
    that the job needs; `resources` are those of the job (for tune, of a trial), None where it uses
    whatever the cluster has. `config` are the settings, with absolute paths of their files.
    """

    job: str
    id: str
    entrypoint: str
    target: str
    settings: str
    submitted: str = ""
    config: Config = field(default_factory=Config, repr=False)
    places: tuple[str, ...] = ()
    preflight: str = ""
    resources: ClusterConfig | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    owner: str = ""
    """Its user: `down` cancels only the jobs of one owner."""

    @property
    def command(self) -> str:
        """The entrypoint after the variables that hold settings, as a shell takes it."""
        settings = [
            f"{name}={shlex.quote(value)}"
            for name, value in self.environment.items()
            if name.upper().startswith(ENVIRONMENT_PREFIX) and name not in self.secrets
        ]
        return " ".join([*settings, self.entrypoint])

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the variables of `environment` that look like secrets."""
        return tuple(name for name in self.environment if _SECRET_LIKE.search(name))


def plan(
    job: str,
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    remote: bool,
    now: datetime,
) -> Submission:
    """The submission for `python -m jobs.<job> argv`.

    Local paths become absolute, as the job starts in another folder. The settings of a recipe file
    of this machine are sent as environment variables. Raises ConfigError for whatever the job
    itself would refuse.
    """
    invocation = parse_command_line(job, argv, environ)
    if job == "train":
        train, cluster = invocation.config.train, invocation.config.cluster
        check_batch_size(train.batch_size, train.micro_batch_size, cluster.num_workers)
    places = _places(invocation, remote=remote, now=now)
    recipe = _find_local_recipe(invocation)
    flags = [text for name, urls in places.items() for text in (f"--{name}", ",".join(urls))]
    replaced = {f"--{name}" for name in places}
    if recipe is not None:
        replaced.add("--recipe")
        settings = settings_as_variables(read_recipe(str(recipe)), read_environment(environ))
        environ = {k: v for k, v in environ.items() if k.upper() not in settings} | settings
    (target,) = places[_output_argument(places)]
    sent, kept = split_environment(job, environ, remote=remote)
    new_argv = [*flags, *_drop_flags(argv, replaced)]
    return Submission(
        job=job,
        id=submission_id(job, target),
        entrypoint=shlex.join(["python", "-m", JOBS[job].module, *new_argv]),
        target=target,
        settings=_settings_digest(invocation, places),
        submitted=f"{now:%Y%m%d-%H%M%S}",
        config=_absolute_config(invocation, places),
        places=tuple(url for urls in places.values() for url in urls),
        preflight=_preflight(places, _needed_secrets(invocation, environ)),
        resources=_resources(invocation),
        environment=sent,
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
    """The variables that a job gets, and the names of the AWS_* and, if it is tracked, WANDB_*
    variables that are not sent."""
    prefixes = ["AWS_", *(["WANDB_"] if "tracking" in JOBS[job].sections else [])]
    settings = {k for k in environ if k.upper().startswith(ENVIRONMENT_PREFIX)}
    if job != "prepare":
        settings.discard(HASH_KEY)
    others = {k for k in environ if k.startswith(tuple(prefixes))}
    others -= {"AWS_EC2_METADATA_DISABLED", "AWS_PAGER"} if remote else set()  # no job needs them
    allowed = others & (STORAGE_VARIABLES | TRACKING_VARIABLES) if remote else others
    sent = {name: environ[name] for name in sorted(settings | allowed)}
    return sent, tuple(sorted(others - allowed))


def settings_as_variables(*layers: Mapping[str, Any]) -> dict[str, str]:
    """The settings of these layers, a later one winning, as an environment variable for each
    section, which other variables override as they override the layers."""
    variables = {}
    for section, value in merge(layers).items():
        text = value if isinstance(value, str) else json.dumps(value)
        variables[f"{ENVIRONMENT_PREFIX}{section.upper()}"] = text
    return variables


def _absolute_config(invocation: Invocation, places: _Places) -> Config:
    """The settings, with absolute paths of the files that they name."""
    files = {
        name: list(places[name]) if isinstance(value, list) else places[name][0]
        for name, value in _settings_naming_files(invocation).items()
    }
    return override(invocation.config, files, "the places")


def _places(invocation: Invocation, *, remote: bool, now: datetime) -> _Places:
    arguments = invocation.arguments.model_dump()
    if arguments.get("source") == "-":
        raise ConfigError(
            "--source -: a list on standard input cannot be sent to a cluster; give URLs"
        )
    if "run" in arguments and arguments["run"] is None:
        if remote:
            raise ConfigError(
                f"{invocation.job}: --run is required on a remote cluster, whose local files are "
                f"lost with it; give a URL that outlives it, such as s3://bucket/runs/{invocation.job}-1"
            )
        arguments["run"] = f"runs/{invocation.job}-{now:%Y%m%d-%H%M%S}"
    given = {name.replace("_", "-"): arguments[name] for name in _PLACES if arguments.get(name)}
    given |= _settings_naming_files(invocation)
    return {
        name: [storage.normalise(url) for url in (value if isinstance(value, list) else [value])]
        for name, value in given.items()
    }


def _settings_naming_files(invocation: Invocation) -> dict[str, str | list[str]]:
    """The settings that name files or stores, from flags, recipe or environment."""
    sections, config = JOBS[invocation.job].sections, invocation.config
    found: dict[str, str | list[str]] = {}
    if "prepare" in sections and config.prepare.without:
        found["prepare.without"] = config.prepare.without
    if "split" in sections and config.split.list is not None:
        found["split.list"] = config.split.list
    if "model" in sections and config.model.weights not in WEIGHTS_WITHOUT_FILE:
        found["model.weights"] = config.model.weights
    return found


def _needed_secrets(invocation: Invocation, environ: Mapping[str, str]) -> list[str]:
    """The secrets without which the job fails, or has other results than on this machine."""
    needs = []
    arguments = invocation.arguments
    if isinstance(arguments, PrepareArguments):
        is_url = "://" in arguments.source and not arguments.source.startswith("file://")
        if is_url or environ.get(HASH_KEY):
            needs.append(HASH_KEY)
    is_tracked = "tracking" in JOBS[invocation.job].sections
    # The more private of mode and variable applies, as in pneumo.reporting.tracking.
    is_private = environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if is_tracked and invocation.config.tracking.mode == "online" and not is_private:
        needs.append("WANDB_API_KEY")
    return needs


def _resources(invocation: Invocation) -> ClusterConfig | None:
    """The resources of the job; for a search, of one trial."""
    config = invocation.config
    if "cluster" not in JOBS[invocation.job].sections:
        return None
    if invocation.job != "tune":
        return config.cluster
    return config.cluster.model_copy(update={"num_workers": config.tune.workers_per_trial})


def _output_argument(places: _Places) -> str:
    """The argument that names where the job writes."""
    return [name for name in _OUTPUTS if name in places][-1]


def _preflight(places: _Places, needs: Sequence[str]) -> str:
    output = _output_argument(places)
    flags = [
        text
        for name, urls in places.items()
        for url in urls
        for text in ("--writes" if name == output else "--reads", url)
    ]
    needed = [text for name in needs for text in ("--needs", name)]
    return shlex.join(["python", "-m", "jobs.preflight", *flags, *needed])


def _find_local_recipe(invocation: Invocation) -> Path | None:
    name = invocation.arguments.recipe
    if name is None or not name.endswith(".toml"):
        return None
    return storage.local_path(name) if storage.is_local(name) else None


def _drop_flags(argv: Sequence[str], flags: set[str]) -> list[str]:
    """`argv` without `flags` and their values, in both forms: `--run X` and `--run=X`."""
    kept: list[str] = []
    skip = False
    for text in argv:
        if not skip and text.split("=", 1)[0] not in flags:
            kept.append(text)
        skip = not skip and text in flags
    return kept


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
            "cluster; use an s3:// URL to avoid that"
        )
    if kept:
        warnings.append(
            f"not sent, as they belong to this machine: {', '.join(kept)}; the cluster needs "
            "credentials of its own, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from here"
        )
    endpoints = [k for k, v in sent.items() if "://" in v and not is_remote(v)]
    if endpoints:
        warnings.append(f"{', '.join(endpoints)}: names this machine; the cluster cannot reach it")
    return tuple(warnings)
