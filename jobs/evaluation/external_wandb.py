"""What W&B gets of an external validation: the numbers of `external/metrics.json`."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.evaluation.evaluated_run import METRICS
from jobs.evaluation.result_files import EXTERNAL_FOLDER, EXTERNAL_MATRIX, REPORT
from pneumo.evaluation.operating_points import DECISION
from pneumo.reporting.tracking import tracked_run
from pneumo.reporting.tracking.media import (
    Artifact,
    Gallery,
    Page,
    Picture,
    Scalar,
    Table,
)
from pneumo.reporting.tracking.tracked_run import TrackedRun

_SIDES = ("internal", "external", "difference")


def read_external(run_url: str) -> TrackedRun | None:
    """The external validation in the run's folder; None where there is none."""
    names = (METRICS, EXTERNAL_MATRIX, REPORT)
    contents = tracked_run.read_files(run_url, *(f"{EXTERNAL_FOLDER}/{name}" for name in names))
    if contents is None:
        return None
    data, matrix, page = contents
    metrics, name = json.loads(data), tracked_run.make_run_id(run_url)
    trained = tracked_run.read_config(run_url)
    tracking = tracked_run.choose_tracking(trained, metrics.get("tracking", {}))
    sets = metrics["sets"]
    summary = {
        f"eval/external/{tracked_run.to_wandb_name(of_set)}/{what}": value
        for of_set, found in sets.items()
        for what, value in _summarise(found)
        if value is not None
    }
    return TrackedRun(
        id=f"{name}-external-{hashlib.sha256(data).hexdigest()[:8]}",
        name=f"{name}-external",
        group=tracking.group or name,
        job_type="external",
        tracking=tracking,
        config={} if trained is None else trained.without_paths(),
        summary=summary,
        media={
            "eval/external/matrix": Gallery([Picture(matrix, "AUROC: run (row) on set (column)")]),
            "eval/external/sets": _tabulate(sets),
            "eval/external/report": Page(page.decode()),
        },
        outputs=[Artifact(f"external-{name}", "evaluation", {METRICS: data, REPORT: page})],
    )


def _list_estimates(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By name, the estimates of one set: internal, external, and their difference."""
    named = {name: found[name] for name in ("auroc", "brier", "in_the_large", "metadata_auroc")}
    return named | {name: found[name][DECISION] for name in ("sensitivity", "specificity")}


def _summarise(found: Mapping[str, Any]) -> Iterator[tuple[str, Scalar]]:
    for what, both in _list_estimates(found).items():
        for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            yield f"{what}{suffix}", both["external"][end]
            yield f"{what}_difference{suffix}", both["difference"][end]
    yield from {
        "n": found["external"]["n"],
        "positives": found["external"]["positives"],
        "left_out_of_patients": found["left_out"]["of_patients"],
        "left_out_of_pictures": found["left_out"]["of_pictures"],
        "left_out_of_their_patients": found["left_out"].get("of_their_patients"),
        "told_apart": found["shift"]["told_apart"]["value"],
    }.items()


def _tabulate(sets: Mapping[str, Any]) -> Table:
    """A row for each set and estimate."""
    columns = ["set", "estimate", *(f"{s}{e}" for s in _SIDES for e in ("", " low", " high"))]
    rows = [
        [of_set, what, *(both[side][end] for side in _SIDES for end in ("value", "low", "high"))]
        for of_set, found in sets.items()
        for what, both in _list_estimates(found).items()
    ]
    return Table(columns, rows)
