"""A call in a background thread, so that Ctrl-C interrupts only the main thread, which waits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def start(call: Callable[[], Result]) -> Future[Result]:
    """Begin the call; what it returns or raises comes from the future's `result()`.

    KeyboardInterrupt is raised in the main thread alone. In the midst of a library it can do harm:
    urllib3's pool of connections blocks for ever where it is interrupted while it takes its lock.
    The process does not wait for the call at its end.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised by `future.result()`
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future
