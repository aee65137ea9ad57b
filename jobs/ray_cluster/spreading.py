"""Many Ray tasks of one function, a limited number at a time."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray


def spread(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    max_running: Callable[[], int],
    **options: Any,
) -> Iterator[list[Any]]:
    """Run `function` as a Ray task for each of `calls`; yields lists of results as tasks end, and
    an empty list after each second without one.

    At most `max_running()` tasks run at a time; it is called each time, so that a cluster that
    grows is used. `options` are those of `ray.remote`; a task whose worker dies is run again.
    """
    task = ray.remote(**options)(function)
    pending = iter(calls)
    ahead = list(islice(pending, 1))  # made while the others run
    running: list[Any] = []
    while True:
        while ahead and len(running) < max_running():
            running.append(task.remote(*ahead.pop()))
            ahead = list(islice(pending, 1))
        if not running:
            return
        ready, running = ray.wait(running, timeout=1.0)
        yield ray.get(ready)
