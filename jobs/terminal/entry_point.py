"""The entry point of every job: its command line, its errors and its exit code.

0 done, 1 failed, 2 the user's mistake, 130 interrupted. An error is one line; `--debug` adds the
traceback. Nothing here imports torch, Ray or image decoders: a mistake is reported at once.
"""

import io
import os
import pkgutil
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from jobs.terminal.places import check_places
from jobs.terminal.ray_address import check_ray_address
from pneumo import storage
from pneumo.command_line import Invocation, parse_command_line
from pneumo.config_layers import LATER_ATTEMPT
from pneumo.errors import INTERRUPTED, ConfigError, FinishedError, PneumoError


def run_job(job: str, function: str, argv: Sequence[str] | None = None) -> int:
    """Check the command line, then import and call `function` ("module:name"); its exit code."""

    def main(arguments: Sequence[str]) -> None:
        invocation = check_invocation(job, arguments)
        pkgutil.resolve_name(function)(invocation)

    return run_main(job, main, argv)


def check_invocation(job: str, argv: Sequence[str]) -> Invocation:
    """Parse and check a job's command line, that its inputs exist and its outputs do not, and that
    the Ray cluster of RAY_ADDRESS answers.

    Raises UserError, and ClusterError without an answer.
    """
    invocation = parse_command_line(job, argv)
    for warning in invocation.warnings:
        tell(f"warning: {warning}")
    check_places(invocation)
    if job not in ("export", "track"):  # the two that use no Ray
        check_ray_address()
    return invocation


def run_main(
    job: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Call `main` with the command line (`sys.argv` if None), and print what it raises as one line;
    returns the exit code."""
    if argv is None:  # this process is the job's own: a scheduler's SIGTERM acts like Ctrl-C
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # keeps the order with stderr in a log
        signal.signal(signal.SIGTERM, lambda number, frame: _interrupt())
        # Ray cancels a job by SIGINT; where a script started Ray with &, SIGINT is ignored.
        if "RAY_JOB_STOP_SIGNAL" in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        main(arguments)
    except KeyboardInterrupt:
        tell(f"{job}: {INTERRUPTED}")
        return 130
    except Exception as error:  # the top of the process: every error ends in one line
        if "--debug" in arguments:
            traceback.print_exc()
        known = find_cause(error)
        if isinstance(known, FinishedError) and os.environ.get(LATER_ATTEMPT):
            tell(f"{job}: an earlier attempt has finished: {known}")
            return 0
        if known is not None:
            tell(f"error: {known}")
            return known.exit_code
        tell(
            f"error: {type(error).__name__}: {summarise_error(error)} (--debug shows the traceback)"
        )
        return 1
    return 0


_GPU_ERRORS = {
    r"ProcessGroupNCCL is only supported with GPUs, no GPUs found|Found no NVIDIA driver|"
    r"No CUDA GPUs are available": (
        "cluster.use_gpu: Ray gave a worker a GPU, and torch finds none there; look at the node's "
        "NVIDIA driver and device plugin, or set --cluster.use-gpu false"
    ),
    r"CUDA out of memory": (
        "a GPU has too little memory; for a training lower --train.micro-batch-size or "
        "--data.image-size, else look what other processes keep there"
    ),
}
"""By torch's message where there is no GPU or too little of it, what to say."""


def find_cause(error: BaseException) -> PneumoError | None:
    """The PneumoError inside the exceptions that Ray wraps around a worker's, if there is one; a
    ConfigError for a GPU that is missing or too small, as another attempt would be no better."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)
        failures = getattr(current, "worker_failures", None) or {}
        if isinstance(current, PneumoError) and not isinstance(inner, BaseException):
            return current
        for pattern, message in _GPU_ERRORS.items():
            if re.search(pattern, str(current)):
                return ConfigError(message)
        queue += [inner if isinstance(inner, BaseException) else None, *failures.values()]
        queue += [current.__cause__, current.__context__]
    return None


_NO_MEMORY = re.compile(r"Memory on the node \(IP: ([\d.]+).*?\) was (\S+) used / (\S+) limit")


def summarise_error(error: BaseException) -> str:
    """The last line of an exception's message; Ray's message about memory is shortened."""
    text = str(error).strip()
    found = _NO_MEMORY.search(text)
    if found:
        return (
            f"node {found[1]} had no memory left ({found[2]} of {found[3]}), and Ray ended a "
            "process there; give it more (on Kubernetes, the overlay's memory of that pod), or for "
            "a worker lower --train.micro-batch-size or set --data.cache stream"
        )
    return (text.splitlines() or [""])[-1]


def _interrupt() -> None:
    raise KeyboardInterrupt


def find_run_url(job: str, run: str | None) -> str:
    """The absolute URL of `--run`; by default, runs/<job>-<time>."""
    return storage.normalise(run or f"runs/{job}-{time.strftime('%Y%m%d-%H%M%S')}")


def tell(line: str) -> None:
    """Print one line for the user, on stderr, so that stdout can be piped."""
    print(line, file=sys.stderr, flush=True)
