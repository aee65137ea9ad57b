"""The measured cost of each fault, printed as a table at the end of the session."""

import json
from dataclasses import dataclass
from pathlib import Path

EPOCHS = 5
MANY_EPOCHS = 12
"""Enough for a node to join during the training."""
BATCH_SIZE = 16
MICRO_BATCH_SIZE = 8
TRAINING = (
    *("--model.weights", "random", "--train.lr", "1e-3", "--train.batch-size", str(BATCH_SIZE)),
    *("--tracking.mode", "disabled"),
)
LARGEST_DIFFERENCE = 1e-3
"""Between the training losses of an epoch on one worker and on two. With two micro-batches a step
the sums have two terms, so they are even equal."""

_HEAD = ("fault", "outcome", "s lost", "steps again", "samples lost", "losses")


@dataclass(frozen=True)
class Record:
    """An epoch's line of metrics.jsonl."""

    loss: float
    samples: int
    """The number of samples that it trained on."""


@dataclass(frozen=True)
class Cost:
    """One row of the table."""

    fault: str
    outcome: str
    """How the run reacted."""
    seconds_lost: float
    """From the fault until training continued; from the restart where the job was started again."""
    steps_again: int
    """Optimiser steps repeated, of those that the driver knew of: it is told once a second."""
    records: list[Record]
    undisturbed: list[Record]
    """Of the same epochs in a run without a fault."""

    @property
    def samples_lost(self) -> int:
        """By number; had other samples taken their place, the losses would differ."""
        pairs = zip(self.records, self.undisturbed, strict=True)
        return sum(abs(ours.samples - theirs.samples) for ours, theirs in pairs)

    @property
    def largest_difference(self) -> float:
        """The largest difference between the losses of an epoch."""
        pairs = zip(self.records, self.undisturbed, strict=True)
        return max(abs(ours.loss - theirs.loss) for ours, theirs in pairs)

    def cells(self) -> tuple[str, ...]:
        """The cells of the row."""
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
    """The records of all epochs. AssertionError unless each epoch is there once, in order."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    return [Record(row["train/loss"], row["data/samples"]) for row in rows]
