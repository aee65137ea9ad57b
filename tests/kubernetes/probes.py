"""Submissions of the probe: a program that prints numbered lines, in place of a job."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.kuberay.jobs import KubernetesTarget
from cluster.submission import Submission
from cluster.targets import JobState
from tests.kubernetes.cluster import OVERLAY, Document, Team


def make_probe(team: Team, name: str, *arguments: object, settings: str = "a") -> Submission:
    """`probe.py LINES PAUSE_S EXIT_CODE [VARIABLE…]` as a submission that writes to the bucket."""
    target = f"{team.bucket or '/tmp'}/{name}"
    return Submission(
        job="prepare",
        id=f"probe-{name}",
        entrypoint=shlex.join(["python", "/probe/probe.py", *map(str, arguments)]),
        target=target,
        settings=settings,
        preflight=f"python -m jobs.preflight --writes {target}",
        environment=dict(team.environ),
    )


@dataclass(frozen=True)
class Seen:
    """What following a probe to its end showed."""

    state: JobState
    lines: Sequence[str]
    notes: Sequence[str]

    @property
    def numbers(self) -> list[int]:
        """Of the probe's numbered lines."""
        return find_numbers(self.lines)


def find_numbers(lines: Sequence[str]) -> list[int]:
    """Of the probe's numbered lines."""
    return [int(line.split()[1]) for line in lines if line.startswith("line ")]


def follow(target: KubernetesTarget, job_id: str) -> Seen:
    """Follow a job to its end."""
    text: list[str] = []
    notes: list[str] = []
    state = target.follow(job_id, text.append, lambda note: notes.append(str(note)))
    return Seen(state, "".join(text).splitlines(), notes)


def write_overlay(
    folder: Path, *patch: Document, base: Path = OVERLAY, components: Sequence[Path] = ()
) -> Path:
    """An overlay of one's own: `base` and `components`, its RayJob changed by a JSON patch."""
    folder.mkdir(exist_ok=True)
    patches = [{"target": {"kind": "RayJob"}, "patch": yaml.safe_dump(list(patch))}]
    kustomization = {
        "resources": [os.path.relpath(base, folder)],
        "components": [os.path.relpath(each, folder) for each in components],
        "patches": patches if patch else [],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def put(path: str, value: object) -> Document:
    """A step of a JSON patch."""
    return {"op": "add", "path": path, "value": value}
