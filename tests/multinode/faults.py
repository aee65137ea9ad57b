"""What a fault cost, measured; a table of it ends the session."""

import json
from dataclasses import dataclass
from pathlib import Path

EPOCHS = 5
MANY_EPOCHS = 12
"""Enough for a node to join while they are trained."""
BATCH_SIZE = 16
MICRO_BATCH_SIZE = 8
TRAINING = (
    *("--model.weights", "random", "--train.lr", "1e-3", "--train.batch-size", str(BATCH_SIZE)),
    *("--tracking.mode", "disabled"),
)
LARGEST_DIFFERENCE = 1e-3
"""Between the training losses of an epoch on one worker and on two. With two micro-batches a step,
sums of two terms, they are even equal."""

_HEAD = ("fault", "outcome", "s lost", "steps again", "samples lost", "losses")


@dataclass(frozen=True)
class Record:
    """What metrics.jsonl says of an epoch."""

    loss: float
    samples: int
    """That its steps were fed."""


@dataclass(frozen=True)
class Cost:
    """One row of the table."""

    fault: str
    outcome: str
    """What the run did about it."""
    seconds_lost: float
    """From the fault until training went on; of a job that was started again, from that start."""
    steps_again: int
    """Optimiser steps done a second time, of those that the driver had heard of, once a second."""
    records: list[Record]
    undisturbed: list[Record]
    """Of the same epochs in a run that nobody disturbed."""

    @property
    def samples_lost(self) -> int:
        """That other samples were not fed in their place shows in the losses."""
        pairs = zip(self.records, self.undisturbed, strict=True)
        return sum(abs(ours.samples - theirs.samples) for ours, theirs in pairs)

    @property
    def largest_difference(self) -> float:
        """Between the losses of an epoch."""
        pairs = zip(self.records, self.undisturbed, strict=True)
        return max(abs(ours.loss - theirs.loss) for ours, theirs in pairs)

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        difference = self.largest_difference
        losses = "equal" if difference == 0 else f"within {difference:.1e}"
        return (
            *(self.fault, self.outcome, f"{self.seconds_lost:.0f}", str(self.steps_again)),
            *(str(self.samples_lost), losses),
        )


def format_table(costs: list[Cost]) -> list[str]:
    """The rows as a Markdown table, columns aligned."""
    rows = [_HEAD, *(cost.cells() for cost in costs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def read_records(run: Path | str, epochs: int = EPOCHS) -> list[Record]:
    """Each epoch's; every epoch is there once, in order, or an assertion fails."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    return [Record(row["train/loss"], row["data/samples"]) for row in rows]
