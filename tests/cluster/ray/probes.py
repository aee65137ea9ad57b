"""Jobs that run `tests/cluster/probe.py` on a Ray cluster."""

from __future__ import annotations

import shlex
from typing import Any

from cluster.ray import jobs, sent_code
from cluster.ray.client import Client
from cluster.ray.following import follow
from cluster.submission import Submission
from tests import CHECKOUT

PROBE = CHECKOUT / "tests" / "cluster" / "probe.py"


def make_probe(name: str, *arguments: object, settings: str = "a", **environ: str) -> Submission:
    return Submission(
        job="train",
        id=f"probe-{name}",
        entrypoint=shlex.join(["python", str(PROBE), *map(str, arguments)]),
        target=f"/nowhere/{name}",
        settings=settings,
        environment=environ,
    )


def start(client: Client, submission: Submission) -> str:
    return jobs.submit(client, submission, sent_code.collect()).id


def follow_to_end(client: Client, job_id: str, **options: Any) -> tuple[str, int]:
    text: list[str] = []
    info = follow(client, job_id, text.append, **options)
    return "".join(text), jobs.state(info).exit_code


def read_numbers(log: str) -> list[int]:
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("line ")]
