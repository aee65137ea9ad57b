"""Work spread over the cluster's workers, a task at a time."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray


def spread(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    at_once: Callable[[], int],
    **options: Any,
) -> Iterator[list[Any]]:
    """What `function` gives for each of `calls`, as they end; an empty list after a second in which
    none did.

    At most `at_once()` run at a time, which is asked anew each time: a cluster that grows is
    filled. `options` are those of `ray.remote`; a task whose worker dies is run again.
    """
    task = ray.remote(**options)(function)
    todo = iter(calls)
    running: list[Any] = []
    while True:
        running += [task.remote(*call) for call in islice(todo, max(0, at_once() - len(running)))]
        if not running:
            return
        ready, running = ray.wait(running, timeout=1.0)
        yield ray.get(ready)
