"""Submit a job to a cluster, follow it, look again, cancel it.

    python -m cluster submit train --store s3://bucket/store --run s3://bucket/runs/1 --recipe fast
    python -m cluster submit --target k8s --overlay gpu-spot train --store … --run …
    python -m cluster list
    python -m cluster logs train-1-0a1b2c3d --follow
    python -m cluster status --watch

The cluster is that of `--address` or RAY_ADDRESS, the Ray Jobs API; with `--target k8s` it is
KubeRay in the namespace that kubectl would use. The exit code of `submit` and `logs --follow` is
the job's: 0 done, 1 failed, 2 the user's mistake, 130 cancelled. Ctrl-C detaches, the job goes on;
twice within three seconds cancels it. The job's log goes to stdout, everything else to stderr.
"""

import argparse
import getpass
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, NoReturn

from cluster import live_view, run_folder
from cluster.targets import JobState, Target, is_remote
from pneumo.errors import AccessError, ClusterError, ConfigError, PneumoError

CANCEL_WINDOW_S = 3.0
"""How long after Ctrl-C another one cancels the job."""

_JOBS = ("prepare", "train", "tune", "evaluate", "predict")
_ON_K8S = ("overlay", "namespace", "context", "image", "workers", "run")


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"cluster: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options, flags = make_parser().parse_known_args(argv)
        if flags and options.command != "submit":
            raise ConfigError(f"cluster: {options.command} takes no {flags[0]}; see --help")
        return _submit(options, flags) if options.command == "submit" else _run_command(options)
    except PneumoError as error:
        if "--debug" in argv:
            traceback.print_exc()
        _tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `logs ID | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _submit(options: argparse.Namespace, flags: list[str]) -> int:
    from cluster import submission  # only here: what is not submitted needs no settings
    from pneumo.command_line import parse_command_line

    if options.job is None:
        raise ConfigError(f"cluster: submit which job? One of: {', '.join(_JOBS)}")
    asked = [flag for flag in flags if flag != "--"]
    if {"-h", "--help"} & set(asked):
        parse_command_line(options.job, ["--help"])
    # Checked before the cluster is looked for: a wrong setting needs none to be seen.
    now = datetime.now()
    wanted = submission.plan(options.job, asked, os.environ, remote=False, now=now)
    on_k8s = options.target == "k8s"
    if on_k8s or is_remote(_address(options)):
        wanted = submission.plan(
            options.job, asked, os.environ, remote=True, now=now, sends_files=not on_k8s
        )
        if wanted.job == "train" and "://" in wanted.target:
            run_folder.check_run(wanted.config, wanted.target)
    target = _connect(options)
    for warning in wanted.warnings:
        _tell(f"warning: {warning}")
    owner = getattr(options, "owner", None) or _default_owner()
    started = target.submit(replace(wanted, owner=owner), _tell)
    if started.already_running:
        _tell(f"already running as {started.id}")
    else:
        _tell(f"submitted as {started.id}: {wanted.entrypoint}")
    if not getattr(options, "follow", True):
        print(started.id)
        return 0
    return _follow(target, started.id)


def _run_command(options: argparse.Namespace) -> int:
    if options.command == "status" and options.id is None and not options.watch:
        raise ConfigError("cluster: status of which job? Give its ID, or --watch for all of mine")
    target = _connect(options)
    if options.command == "list":
        for state in target.list():
            owner = state.owner or "-"
            print(f"{state.id:<44} {state.phase:<9} {_times(state)}  {owner}  {state.target}")
    elif options.command == "status" and options.watch:
        ids = [options.id] if options.id else []
        return live_view.watch(target, ids, options.owner, _show_view, _tell)
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
    """Show the log to the end; the job's exit code, or how the following ended."""
    try:
        state = target.follow(job_id, _write, _tell)
    except KeyboardInterrupt:
        return _detach(target, job_id)
    except (ClusterError, AccessError) as error:
        _tell(f"error: {error}")
        _tell(_reattach_hint(target, job_id))
        return error.exit_code
    _tell(str(state))
    return state.exit_code


def _detach(target: Target, job_id: str) -> int:
    """Leave, or cancel when Ctrl-C comes again at once."""
    _tell(_reattach_hint(target, job_id))
    try:
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
        raise ClusterError(f"cluster: {job_id} was asked to stop and is still {after.phase}")
    _tell(str(after))
    return 0


def _take_down(target: Target, owner: str, *, confirmed: bool) -> int:
    """Cancel the owner's jobs (everybody's, for "") that have not ended; on Kubernetes their
    clusters go with them."""
    going_on = [state for state in target.list() if not state.has_ended]
    running = [s.id for s in going_on if s.is_ours and owner in {s.owner, ""}]
    others = [s.id for s in going_on if s.id not in running]
    whose = f"of {owner}" if owner else "submitted by this project"
    if others:
        _tell(f"left alone, for they are not {whose}: {', '.join(others)}")
    if not running:
        _tell(f"nothing {whose} is running")
        return 0
    if not confirmed and not _agrees(f"cancel {', '.join(running)}?"):
        raise ConfigError(f"cluster: down would cancel {', '.join(running)}; add --yes")
    for job_id in running:
        _cancel(target, job_id)
    return 0


def _agrees(question: str) -> bool:
    """Ask the person, where there is one."""
    if not sys.stdin.isatty():
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _default_owner() -> str:
    with suppress(OSError, KeyError):  # a user without a name, as in some containers
        return f"{getpass.getuser()}@{socket.gethostname()}"
    return f"{os.getuid()}@{socket.gethostname()}"


def _connect(options: argparse.Namespace) -> Target:
    """The target that the options name; imported here, since a wrong setting needs none."""
    given = {name: getattr(options, name, None) for name in _ON_K8S}
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
        )
    stray = [name for name in _ON_K8S if given[name] is not None]
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
        f"detached, the job goes on; back: python -m cluster logs {job_id} --follow "
        f"{target.flags}; stop it: python -m cluster cancel {job_id} {target.flags}"
    )


def _show_status(state: JobState) -> None:
    print(f"job     {state.id}")
    print(f"status  {state.phase}")
    print(f"times   {_times(state)}")
    print(f"writes  {state.target}")
    print(f"runs    {state.entrypoint}")
    if state.gpu_hours:  # none by runs on CPUs
        print(f"GPUs    {state.gpu_hours:.2f} GPU hours by this attempt")
    if state.phase == "waiting" and state.asked_s is not None:
        since = datetime.fromtimestamp(state.asked_s)
        waited_s = max(0, round(time.time() - state.asked_s))
        print(f"waits   since {since:%Y-%m-%d %H:%M:%S}, {waited_s} s: {state.why or 'not said'}")
    elif state.why:
        print(f"why     {state.why}")


def _show_view(text: str) -> None:
    """In a terminal over what was shown before."""
    print(f"\x1b[H\x1b[2J{text}" if sys.stdout.isatty() else text, flush=True)


def _times(state: JobState) -> str:
    """When a job started, on this machine's clock, and how long it has taken."""
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
    where, debug = _cluster_flags(), _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(prog="python -m cluster", description=(__doc__ or "").split("\n")[0])
    parser.set_defaults(target="ray")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_submit(commands, [where, _submit_flags()])
    about_jobs = [where, debug]
    commands.add_parser("list", parents=about_jobs, help="the jobs that the cluster remembers")
    status = commands.add_parser("status", parents=about_jobs, help="how a job is doing")
    status.add_argument(
        "--watch", action="store_true", help="show all runs of mine until they have ended"
    )
    logs = commands.add_parser("logs", parents=about_jobs, help="a job's log")
    logs.add_argument("--follow", action="store_true", help="stay until the job ends")
    logs.add_argument("--run", metavar="URL", help="k8s: where it wrote, for one that was deleted")
    cancel = commands.add_parser(
        "cancel", parents=about_jobs, help="ask a job to stop, and wait until it has"
    )
    down = commands.add_parser("down", parents=about_jobs, help="cancel every job of mine")
    down.add_argument("--all", action="store_true", help="everybody's that this project submitted")
    down.add_argument("--yes", action="store_true", help="without asking")
    for command in (status, logs, cancel):
        count = "?" if command is status else None
        command.add_argument("id", nargs=count, metavar="ID", help="as submit and list print it")
    for command in (status, down):
        command.add_argument(
            "--owner", default=_default_owner(), help="whose; default: %(default)s"
        )
    return parser


def _add_submit(commands: Any, parents: list[_Parser]) -> None:
    """`submit`, and below it a command for each job."""
    submit = commands.add_parser(
        "submit", parents=parents, allow_abbrev=False, help="send a job, follow its log"
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
    where = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    where.add_argument(
        "--target", choices=("ray", "k8s"), help="the Ray Jobs API (default), or KubeRay"
    )
    where.add_argument(
        "--address",
        metavar="URL",
        help="the Ray dashboard, http://HEAD:8265; default: RAY_ADDRESS",
    )
    where.add_argument("--context", help="k8s: of the kubeconfig; default: the current one")
    where.add_argument("--namespace", help="k8s: default: the context's")
    return where


def _submit_flags() -> _Parser:
    """Flags of submit."""
    stay = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    # Without a default of their own: one given before the job's name would be lost to it.
    stay.add_argument(
        "--follow",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the log to the end (default)",
    )
    stay.add_argument(
        "--detach", dest="follow", action="store_false", default=argparse.SUPPRESS,
        help="print the id and leave",
    )  # fmt: skip
    stay.add_argument("--owner", help="whose job it is, for `down`; default: user@host")
    stay.add_argument("--overlay", help="k8s: a folder of k8s/overlays, or the path of your own")
    stay.add_argument("--image", help="k8s: of every container, best by digest")
    stay.add_argument(
        "--workers", type=int, help="k8s: worker pods; default: as many as the job asks for"
    )
    return stay


if __name__ == "__main__":
    sys.exit(main())
