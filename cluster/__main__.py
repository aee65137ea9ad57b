"""Submit a job to a running Ray cluster, follow it, look again, cancel it.

    python -m cluster submit train --store s3://bucket/store --run s3://bucket/runs/1 --recipe fast
    python -m cluster list
    python -m cluster logs train-1-0a1b2c3d --follow

The cluster is `--address` or RAY_ADDRESS. The exit code of `submit` and `logs --follow` is the
job's: 0 done, 1 failed, 2 the user's mistake, 130 cancelled. Ctrl-C detaches; the job goes on.
The job's log goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from cluster import package, submission
from pneumo.config import JOBS, parse_command_line
from pneumo.errors import ConfigError, PneumoError

if TYPE_CHECKING:
    from cluster import ray_jobs


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"cluster: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options, flags = _parser().parse_known_args(argv)
        if flags and options.command != "submit":
            raise ConfigError(f"cluster: {options.command} takes no {flags[0]}; see --help")
        return _submit(options, flags) if options.command == "submit" else _look(options)
    except PneumoError as error:
        if "--debug" in argv:
            traceback.print_exc()
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `logs ID | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _submit(options: argparse.Namespace, flags: list[str]) -> int:
    if options.job is None:
        raise ConfigError(f"cluster: submit which job? One of: {', '.join(JOBS)}")
    asked = [flag for flag in flags if flag != "--"]
    if {"-h", "--help"} & set(asked):
        parse_command_line(options.job, ["--help"])
    # Checked before the address is looked at: a wrong setting needs no cluster to be seen.
    local = submission.plan(options.job, asked, os.environ, remote=False, now=datetime.now())
    address = _address(options)
    wanted = local
    if submission.is_remote(address):
        wanted = submission.plan(options.job, asked, os.environ, remote=True, now=datetime.now())
    code = package.collect()
    client = _connect(address)
    from cluster import ray_jobs

    for warning in wanted.warnings:
        _say(f"warning: {warning}")
    started = ray_jobs.submit(client, wanted, code)
    if started.already_running:
        _say(f"already running as {started.id}")
    else:
        _say(f"submitted as {started.id}: {wanted.entrypoint}")
        _say(f"sent {code}; environment: {', '.join(wanted.environment) or 'none'}")
    if not options.follow:
        print(started.id)
        return 0
    return _follow(client, started.id, address)


def _look(options: argparse.Namespace) -> int:
    address = _address(options)
    client = _connect(address)
    from cluster import ray_jobs

    if options.command == "list":
        for info in ray_jobs.list_jobs(client):
            state = info.status.value
            print(f"{info.submission_id:<44} {state:<9} {_times(info)}  {_target(info)}")
    elif options.command == "status":
        _show_status(ray_jobs.details(client, options.id))
    elif options.command == "cancel":
        return _cancel(client, options.id)
    elif options.follow:
        return _follow(client, options.id, address)
    else:
        print(ray_jobs.logs(client, options.id), end="")
    return 0


def _follow(client: ray_jobs.Client, job_id: str, address: str) -> int:
    from cluster import ray_jobs

    try:
        info = ray_jobs.follow(client, job_id, _write, lambda text: _say(str(text)))
    except (KeyboardInterrupt, ray_jobs.OutOfReachError) as stop:
        if isinstance(stop, ray_jobs.OutOfReachError):
            _say(f"error: {stop}")
        _say(
            f"detached, the job goes on; back: python -m cluster logs {job_id} --follow --address "
            f"{address}; stop it: python -m cluster cancel {job_id} --address {address}"
        )
        return 130 if isinstance(stop, KeyboardInterrupt) else 1
    code = ray_jobs.exit_code(info)
    why = f": {ray_jobs.failure(info)}" if info.status.value == "FAILED" else ""
    _say(f"{job_id} {info.status.value.lower()}{why}")
    return code


def _cancel(client: ray_jobs.Client, job_id: str) -> int:
    from cluster import ray_jobs

    before = ray_jobs.details(client, job_id)
    if before.status.is_terminal():
        _say(f"{job_id} had ended already: {before.status.value.lower()}")
        return 0
    after = ray_jobs.cancel(client, job_id)
    if not after.status.is_terminal():
        raise PneumoError(f"cluster: {job_id} was asked to stop and is still {after.status.value}")
    _say(f"{job_id} {after.status.value.lower()}")
    return 0


def _connect(address: str) -> ray_jobs.Client:
    from cluster import ray_jobs  # half a second, and not needed for a wrong setting

    return ray_jobs.connect(address, os.environ)


def _address(options: argparse.Namespace) -> str:
    address: str = getattr(options, "address", None) or os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ConfigError(
            "cluster: no address; give --address http://HEAD:8265 or set RAY_ADDRESS (to run on "
            "this machine, without a cluster: python -m jobs.<job>)"
        )
    return address.rstrip("/")


def _show_status(info: Any) -> None:
    from cluster import ray_jobs

    state = info.status.value
    print(f"job     {info.submission_id}")
    print(f"status  {state}{f' ({ray_jobs.failure(info)})' if state == 'FAILED' else ''}")
    print(f"times   {_times(info)}")
    print(f"writes  {_target(info)}")
    print(f"runs    {info.entrypoint}")
    if state == "PENDING" and info.message:
        print(f"waits   {info.message.splitlines()[0]}")


def _target(info: Any) -> str:
    return str((info.metadata or {}).get("target", ""))


def _times(info: Any) -> str:
    """When a job started, on this machine's clock, and how long it has taken."""
    if info.start_time is None:
        return "not started"
    start = datetime.fromtimestamp(info.start_time / 1000)
    end = datetime.fromtimestamp(info.end_time / 1000) if info.end_time else datetime.now()
    return f"{start:%Y-%m-%d %H:%M:%S}, {max(0, round((end - start).total_seconds()))} s"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> _Parser:
    where = _Parser(add_help=False)
    where.add_argument(
        "--address",
        default=argparse.SUPPRESS,
        metavar="URL",
        help="the cluster's dashboard, http://HEAD:8265; default: RAY_ADDRESS",
    )
    stay = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    stay.add_argument("--follow", action="store_true", help="show the log to the end (default)")
    stay.add_argument(
        "--detach", dest="follow", action="store_false", help="print the id and leave"
    )
    parser = _Parser(prog="python -m cluster", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    submit = commands.add_parser(
        "submit", parents=[where, stay], allow_abbrev=False, help="send a job, follow its log"
    )
    submit.set_defaults(follow=True)
    jobs = submit.add_subparsers(dest="job", metavar="JOB")
    for name, job in JOBS.items():
        jobs.add_parser(
            name,
            parents=[where, stay],
            allow_abbrev=False,
            add_help=False,
            help=f"takes the flags of python -m {job.module}, and --help shows them",
        )
    debug = _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands.add_parser("list", parents=[where, debug], help="the jobs that the cluster remembers")
    for name, text in (
        ("status", "how a job is doing"),
        ("logs", "a job's log"),
        ("cancel", "ask a job to stop, and wait until it has"),
    ):
        command = commands.add_parser(name, parents=[where, debug], help=text)
        command.add_argument("id", metavar="ID", help="as submit and list print it")
        if name == "logs":
            command.add_argument("--follow", action="store_true", help="stay until the job ends")
    return parser


if __name__ == "__main__":
    sys.exit(main())
