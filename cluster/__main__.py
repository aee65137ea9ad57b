"""Submit a job to a cluster; follow, list and cancel jobs.

    python -m cluster submit train --store s3://bucket/store --run s3://bucket/runs/1 --recipe fast
    python -m cluster submit --target k8s --overlay gpu-spot train --store … --run …
    python -m cluster list
    python -m cluster logs train-1-0a1b2c3d --follow
    python -m cluster status --watch

The cluster is the Ray Jobs API at `--address` or RAY_ADDRESS; with `--target k8s` it is KubeRay in
the namespace that kubectl would use. The exit code of `submit` and `logs --follow` is the job's: 0
done, 1 failed, 2 the user's mistake, 130 cancelled. Ctrl-C detaches and the job continues; a second
Ctrl-C within three seconds cancels it. The job's log goes to stdout, everything else to stderr.
"""

import argparse
import getpass
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

from cluster import live_view, run_folder
from cluster.targets import JobState, LostError, Target, Write, is_remote
from pneumo import background
from pneumo.errors import AccessError, ClusterError, ConfigError, PneumoError

CANCEL_WINDOW_S = 3.0
"""A second Ctrl-C within this time cancels the job."""

_JOBS = ("prepare", "train", "tune", "evaluate", "predict")
_K8S_FLAGS = ("overlay", "namespace", "context", "image", "workers", "run")


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"cluster: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options, flags = make_parser().parse_known_args(argv)
        return (_submit if options.command == "submit" else _run_command)(options, flags)
    except PneumoError as error:
        if "--debug" in argv:
            traceback.print_exc()
        _tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has closed the pipe, as in `logs ID | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the top of the process: every error ends in one line
        if "--debug" in argv:
            traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        _tell(f"error: {type(error).__name__}: {lines[-1]} (--debug shows the traceback)")
        return 1


def _submit(options: argparse.Namespace, flags: list[str]) -> int:
    from cluster import submission  # slow to import, and only `submit` needs it
    from pneumo.command_line import parse_command_line

    if options.job is None:
        raise ConfigError(f"cluster: submit needs a job, one of: {', '.join(_JOBS)}")
    job_flags = [flag for flag in flags if flag != "--"]
    if {"-h", "--help"} & set(job_flags):
        parse_command_line(options.job, ["--help"])
    # Checked before connecting: a wrong setting can be reported without a cluster.
    now = datetime.now()
    planned = submission.plan(options.job, job_flags, os.environ, remote=False, now=now)
    target = None
    if options.target != "k8s" and not is_remote(_address(options)):
        target = _connect(options)
    if target is None or not target.is_here:
        planned = submission.plan(options.job, job_flags, os.environ, remote=True, now=now)
        if planned.job == "train" and "://" in planned.target:
            run_folder.check_run(planned.config, planned.target)
    target = target or _connect(options)
    for warning in planned.warnings:
        _tell(f"warning: {warning}")
    owner = getattr(options, "owner", None) or _default_owner()
    owned = replace(planned, owner=owner)
    started = background.start(lambda: target.submit(owned, _tell)).result()
    if started.already_running:
        _tell(f"already running as {started.id}")
    else:
        _tell(f"submitted as {started.id}: {planned.entrypoint}")
    if not getattr(options, "follow", True):
        print(started.id)
        return 0
    return _follow(target, started.id)


def _run_command(options: argparse.Namespace, flags: list[str]) -> int:
    if flags:
        raise ConfigError(f"cluster: {options.command} takes no {flags[0]}; see --help")
    if options.command == "status" and options.id is None and not options.watch:
        raise ConfigError("cluster: status needs the ID of a job, or --watch for all of yours")
    target = _connect(options)
    if options.command == "list":
        for state in target.list():
            owner = state.owner or "-"
            print(f"{state.id:<44} {state.phase:<9} {_times(state)}  {owner}  {state.target}")
    elif options.command == "status" and options.watch:
        ids = [options.id] if options.id else []
        return background.start(
            lambda: live_view.watch(target, ids, options.owner, _show_view, _tell)
        ).result()
    elif options.command == "status":
        _show_status(target.state(options.id))
    elif options.command == "cancel":
        return _cancel(target, options.id)
    elif options.command == "down":
        return _take_down(target, "" if options.all else options.owner, confirmed=options.yes)
    elif options.follow:
        return _follow(target, options.id)
    else:
        print(target.logs(options.id), end="")
    return 0


def _follow(target: Target, job_id: str) -> int:
    """Show the log to the end; returns the job's exit code, or that of what ended the following."""
    is_detached = threading.Event()

    def until_detached(show: Write) -> Write:
        return lambda text: None if is_detached.is_set() else show(text)

    shows = until_detached(_write), until_detached(_tell)
    try:
        state = background.start(lambda: target.follow(job_id, *shows)).result()
    except KeyboardInterrupt:
        is_detached.set()
        return _detach(target, job_id)
    except (ClusterError, AccessError) as error:
        _tell(f"error: {error}")
        if not isinstance(error, LostError):
            _tell(_reattach_hint(target, job_id))
        return error.exit_code
    _tell(str(state))
    return state.exit_code


def _detach(target: Target, job_id: str) -> int:
    """Leave the job running, or cancel it after a second Ctrl-C."""
    try:
        _tell(_reattach_hint(target, job_id))
        _tell(f"Ctrl-C again within {CANCEL_WINDOW_S:g} s cancels it")
        time.sleep(CANCEL_WINDOW_S)
    except KeyboardInterrupt:
        _cancel(target, job_id)
    return 130


def _cancel(target: Target, job_id: str) -> int:
    before = target.state(job_id)
    if before.has_ended:
        _tell(f"{job_id} had ended already: {before.phase}")
        return 0
    after = target.cancel(job_id)
    if not after.has_ended:
        raise ClusterError(f"cluster: {job_id} was asked to stop, but is still {after.phase}")
    _tell(str(after))
    return 0


def _take_down(target: Target, owner: str, *, confirmed: bool) -> int:
    """Cancel all jobs of `owner` that have not ended ("": of every owner); on Kubernetes their Ray
    clusters are deleted too."""
    active = [state for state in target.list() if not state.has_ended]
    running = [s.id for s in active if s.is_ours and owner in {s.owner, ""}]
    others = [s.id for s in active if s.id not in running]
    whose = f"of {owner}" if owner else "submitted by this project"
    if others:
        _tell(f"not cancelled, as they are not {whose}: {', '.join(others)}")
    if not running:
        _tell(f"no job {whose} is running")
        return 0
    if not confirmed and not _agrees(f"cancel {', '.join(running)}?"):
        raise ConfigError(f"cluster: down would cancel {', '.join(running)}; add --yes")
    failures = []
    for job_id in running:  # all of them, whatever becomes of the first: they hold machines
        try:
            _cancel(target, job_id)
        except PneumoError as error:
            failures.append(error)
            _tell(f"error: {error}")
    return max((error.exit_code for error in failures), default=0)


def _agrees(question: str) -> bool:
    """Ask the user; False where stdin is no terminal."""
    if not sys.stdin.isatty():
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _default_owner() -> str:
    with suppress(OSError, KeyError):  # a user without a name, as in some containers
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"{os.getuid()}@{socket.gethostname()}"


def _connect(options: argparse.Namespace) -> Target:
    """The target that the options name; imported here, so that a wrong setting is reported fast."""
    given = {name: getattr(options, name, None) for name in _K8S_FLAGS}
    if options.target == "k8s":
        from cluster.kuberay import kubeconfig, overlays
        from cluster.kuberay.jobs import KubernetesTarget

        submits, workers = options.command == "submit", given["workers"]
        if workers is not None and workers < 1:
            raise ConfigError(f"cluster: --workers {workers}: at least 1")
        return KubernetesTarget(
            kubeconfig.connect(given["context"], given["namespace"]),
            overlays.find_overlay(given["overlay"]) if submits else None,
            given["image"],
            workers,
            given["run"],
            is_followed=getattr(options, "follow", True),
        )
    stray = [name for name in _K8S_FLAGS if given[name] is not None]
    if stray:
        raise ConfigError(f"cluster: --{stray[0]} has no effect without --target k8s")
    address = _address(options)
    from cluster.ray import client
    from cluster.ray import jobs as ray_jobs

    if client.sends_token_openly(address, os.environ):
        _tell(
            f"warning: the token goes to {address} unencrypted; forward the port, or use https://"
        )
    return ray_jobs.RayTarget(address, client.connect(address, os.environ))


def _address(options: argparse.Namespace) -> str:
    address: str = getattr(options, "address", None) or os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ConfigError(
            "cluster: no address; give --address http://HEAD:8265 or set RAY_ADDRESS (Kubernetes: "
            "--target k8s; this machine, without a cluster: python -m jobs.<job>)"
        )
    return address.rstrip("/")


def _reattach_hint(target: Target, job_id: str) -> str:
    return (
        f"detached, the job goes on; to follow it: python -m cluster logs {job_id} --follow "
        f"{target.flags}; to stop it: python -m cluster cancel {job_id} {target.flags}"
    )


def _show_status(state: JobState) -> None:
    print(f"job     {state.id}")
    print(f"status  {state.phase}")
    print(f"times   {_times(state)}")
    print(f"writes  {state.target}")
    print(f"runs    {state.entrypoint}")
    if state.gpu_hours:  # not shown for runs on CPUs
        print(f"GPUs    {state.gpu_hours:.2f} GPU hours by this attempt")
    if state.phase == "waiting" and state.asked_s is not None:
        since = datetime.fromtimestamp(state.asked_s)
        waited_s = max(0, round(time.time() - state.asked_s))
        print(f"waits   since {since:%Y-%m-%d %H:%M:%S}, {waited_s} s: {state.why or 'not said'}")
    elif state.why:
        print(f"why     {state.why}")


def _show_view(text: str) -> None:
    """Show the table; in a terminal it replaces the last one."""
    print(f"\x1b[H\x1b[2J{text}" if sys.stdout.isatty() else text, flush=True)


def _times(state: JobState) -> str:
    """When a job started, in local time, and how long it has taken."""
    if state.started_s is None:
        return "not started"
    start = datetime.fromtimestamp(state.started_s)
    taken_s = max(0, round((state.ended_s or time.time()) - state.started_s))
    return f"{start:%Y-%m-%d %H:%M:%S}, {taken_s} s"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> _Parser:
    cluster, debug = _cluster_flags(), _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(prog="python -m cluster", description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(target="ray")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_submit(commands, [cluster, _submit_flags()])
    parents = [cluster, debug]
    commands.add_parser("list", parents=parents, help="list the jobs that the cluster knows")
    status = commands.add_parser("status", parents=parents, help="show the state of a job")
    status.add_argument(
        "--watch", action="store_true", help="show all my runs until they have ended"
    )
    logs = commands.add_parser("logs", parents=parents, help="show a job's log")
    logs.add_argument("--follow", action="store_true", help="follow it until the job ends")
    logs.add_argument("--run", metavar="URL", help="k8s: the URL that a deleted run wrote to")
    cancel = commands.add_parser(
        "cancel", parents=parents, help="cancel a job, and wait until it has ended"
    )
    down = commands.add_parser("down", parents=parents, help="cancel all my jobs")
    down.add_argument("--all", action="store_true", help="this project's jobs of all owners")
    down.add_argument("--yes", action="store_true", help="do not ask")
    for command in (status, logs, cancel):
        count = "?" if command is status else None
        command.add_argument("id", nargs=count, metavar="ID", help="as submit and list print it")
    for command in (status, down):
        command.add_argument(
            "--owner", default=_default_owner(), help="the owner of the jobs; default: %(default)s"
        )
    return parser


def _add_submit(commands: Any, parents: list[_Parser]) -> None:
    """Add `submit`, with a subcommand for each job."""
    submit = commands.add_parser(
        "submit", parents=parents, allow_abbrev=False, help="submit a job, and follow its log"
    )
    jobs = submit.add_subparsers(dest="job", metavar="JOB")
    for name in _JOBS:
        jobs.add_parser(
            name,
            parents=parents,
            allow_abbrev=False,
            add_help=False,
            help=f"takes the flags of python -m jobs.{name}, and --help shows them",
        )


def _cluster_flags() -> _Parser:
    """Flags that name a cluster."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--target", choices=("ray", "k8s"), help="the Ray Jobs API (default), or KubeRay"
    )
    parser.add_argument(
        "--address",
        metavar="URL",
        help="the Ray dashboard, http://HEAD:8265; default: RAY_ADDRESS",
    )
    parser.add_argument("--context", help="k8s: of the kubeconfig; default: the current context")
    parser.add_argument("--namespace", help="k8s: default: the context's")
    return parser


def _submit_flags() -> _Parser:
    """Flags of submit, before or after the job's name: a default would replace one before it."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--follow", action="store_true", help="show the log to the end (default)")
    parser.add_argument(
        "--detach", dest="follow", action="store_false", help="print the id and exit"
    )
    parser.add_argument("--owner", help="owner of the job, for `down`; default: user@host")
    parser.add_argument("--overlay", help="k8s: a folder of k8s/overlays, or the path of your own")
    parser.add_argument("--image", help="k8s: the image of all containers, best with its digest")
    parser.add_argument(
        "--workers", type=int, help="k8s: worker pods; default: as many as the job asks for"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
