"""Waits for another thread or process, and counts calls instead of seconds."""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


def wait_until(
    look: Callable[[], Found],
    what: str | Callable[[], str],
    *,
    timeout_s: float = 120,
    pause_s: float = 0.02,
) -> Found:
    """The first true value of `look`. AssertionError with `what` and the last value of `look` after
    the timeout.

    The timeout is long: it only ends a test that hangs.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > deadline_s:
            said = what if isinstance(what, str) else what()
            raise AssertionError(f"waited {timeout_s:g} s for {said}; it is still {found!r}")
        time.sleep(pause_s)
    return found


def count_calls(function: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called while `function` runs.

    A measure of work that does not depend on the machine or on what else runs there.
    """
    number = 0

    def count(frame: object, event: str, argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return number
