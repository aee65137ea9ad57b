"""What of a submitter's log reaches the person; its lines are cut from real ones."""

from cluster.kuberay.kept_logs import DriverLog

STARTED = "2026-01-02 03:04:05,678\tINFO job_manager.py:581 -- Runtime env is setting up."
CLIENT = [
    "2026-01-02 03:04:05,285\tINFO cli.py:42 -- \x1b[37mJob submission server address\x1b[39m: x",
    "2026-01-02 03:04:05,507\tSUCC cli.py:67 -- \x1b[32mJob 'x' submitted successfully\x1b[39m",
]
LOST = [
    "2026-01-02 03:09:05,579\tINFO sdk.py:520 -- WebSocket closed for job x with close code 1006",
    "Traceback (most recent call last):",
    '  File "/app/.venv/bin/ray", line 6, in <module>',
    "    sys.exit(main())",
    "             ^^^^^^",
    "RuntimeError: WebSocket connection closed unexpectedly with close code 1006",
]
REFUSED = [
    "Traceback (most recent call last):",
    '  File "/app/.venv/lib/urllib3/connection.py", line 198, in _new_conn',
    "    sock = connection.create_connection(",
    "socket.gaierror: [Errno -2] Name or service not known",
    "",
    "During handling of the above exception, another exception occurred:",
    "",
    "Traceback (most recent call last):",
    '  File "/app/.venv/bin/ray", line 6, in <module>',
    "    sys.exit(main())",
    "ConnectionError: Failed to connect to Ray at address: http://x:8265",
]
ENDED = [
    "2026-01-02 03:09:05,051\tERR cli.py:75 -- \x1b[31mJob 'x' failed\x1b[39m",
    "2026-01-02 03:09:05,051\tINFO cli.py:89 -- Status message: Job entrypoint command failed with",
    "line 0",
    "error: no such file",
]


def show(*logs: list[str]) -> tuple[list[str], list[str]]:
    """What is written and noted of the logs of submitters, one after the other."""
    text: list[str] = []
    notes: list[str] = []
    log = DriverLog(text.append, lambda note: notes.append(str(note)))
    for lines in logs:
        log.begin()
        for line in lines:
            log.take(line)
    log.flush()
    return "".join(text).splitlines(), notes


def test_only_the_drivers_lines_are_passed_on() -> None:
    driver = [STARTED, "line 0", "error: no such file"]
    assert show([*CLIENT, *driver, *ENDED]) == (driver, [])


def test_a_submitters_traceback_is_dropped_and_a_drivers_is_not() -> None:
    own = [
        "Traceback (most recent call last):",
        '  File "/app/jobs/train.py", line 6, in <module>',
        "ValueError: x",
    ]
    assert show([STARTED, *own, "line 1", *LOST]) == ([STARTED, *own, "line 1"], [])
    assert show(REFUSED) == ([], [])
    assert show([STARTED, *own]) == ([STARTED, *own], [])


def test_a_driver_that_goes_on_is_shown_once_under_another_submitter() -> None:
    first, second = [STARTED, "line 0", "line 1"], [STARTED, "line 0", "line 1", "line 2"]
    assert show([*CLIENT, *first, *LOST], [*CLIENT, *second])[0] == second


def test_a_driver_that_begins_again_is_shown_from_its_beginning() -> None:
    again = [STARTED.replace("03:04", "03:11"), "line 0", "line 1"]
    assert show([STARTED, "line 0", "line 1", "line 2"], again)[0] == [
        *(STARTED, "line 0", "line 1", "line 2"),
        *again,
    ]


def test_waiting_for_the_head_is_said_once() -> None:
    waits = ["Waiting for Ray Dashboard GCS to become healthy at http://x:8265 ..."] * 67
    assert show([*waits, STARTED, "line 0"]) == (
        [STARTED, "line 0"],
        ["waiting: for the head to answer the submitter"],
    )
