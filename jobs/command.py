"""How every job starts and ends: its command line, its errors and its exit code.

0 done, 1 failed, 2 the user's mistake, 130 interrupted. An error is one line; `--debug` adds the
traceback.
"""

from __future__ import annotations

import io
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from pneumo import storage
from pneumo.config import Invocation, parse_command_line
from pneumo.errors import ConfigError, PneumoError


def run_job(job: str, main: Callable[[Invocation], None], argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run `main`, turn what happens into an exit code."""
    return run_main(job, lambda arguments: main(parse_command_line(job, arguments)), argv)


def run_main(
    job: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None
) -> int:
    """Run `main` on the command line, turn what happens into an exit code."""
    if argv is None:  # a process of its own: a scheduler's SIGTERM ends it as Ctrl-C does
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # in a log, results stand in their order
        signal.signal(signal.SIGTERM, lambda number, frame: _interrupt())
    arguments = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in arguments
    try:
        main(arguments)
    except KeyboardInterrupt:
        say(f"{job}: interrupted; the same command goes on from what is finished")
        return 130
    except Exception as error:  # the top of the process: everything ends in one line
        if debug:
            traceback.print_exc()
        known = find_cause(error)
        if known is not None:
            say(f"error: {known}")
            return known.exit_code
        say(f"error: {type(error).__name__}: {last_words(error)} (--debug shows the traceback)")
        return 1
    return 0


_NO_GPU = re.compile(
    r"ProcessGroupNCCL is only supported with GPUs, no GPUs found|Found no NVIDIA driver|"
    r"No CUDA GPUs are available"
)
"""What torch says then."""


def find_cause(error: BaseException) -> PneumoError | None:
    """The PneumoError behind what Ray wraps around a worker's exception, if there is one; a
    ConfigError for a GPU that is not there, which another attempt would not find either."""
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
        if _NO_GPU.search(str(current)):
            return ConfigError(
                "cluster.use_gpu: Ray gave a worker a GPU, and torch finds none there; look at the "
                "node's NVIDIA driver and device plugin, or set --cluster.use-gpu false"
            )
        queue += [inner if isinstance(inner, BaseException) else None, *failures.values()]
        queue += [current.__cause__, current.__context__]
    return None


_NO_MEMORY = re.compile(r"Memory on the node \(IP: ([\d.]+).*?\) was (\S+) used / (\S+) limit")


def last_words(error: BaseException) -> str:
    """The last line of an exception; of Ray's about memory, what it comes to."""
    text = str(error).strip()
    found = _NO_MEMORY.search(text)
    if found:
        return (
            f"node {found[1]} had no memory left ({found[2]} of {found[3]}), and Ray ended a "
            "process there; give it more (on Kubernetes, the overlay's memory of that pod), or for "
            "a worker lower --train.batch-size or set --data.cache stream"
        )
    return (text.splitlines() or [""])[-1]


def _interrupt() -> None:
    raise KeyboardInterrupt


def new_run_url(job: str) -> str:
    """Where a run goes when nobody said: runs/<job>-<time>."""
    return storage.normalise(f"runs/{job}-{time.strftime('%Y%m%d-%H%M%S')}")


def say(line: str) -> None:
    """One line for the person, on stderr, so that stdout can be piped."""
    print(line, file=sys.stderr, flush=True)
