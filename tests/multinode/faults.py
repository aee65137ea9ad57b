"""What a fault cost, measured; a table of it ends the session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

EPOCHS = 5
BATCH_SIZE = 16
MICRO_BATCH_SIZE = 8
TRAINING = (
    *("--model.weights", "random", "--train.lr", "1e-3", "--train.batch-size", str(BATCH_SIZE)),
    *("--tracking.mode", "disabled"),
)
LARGEST_ELASTIC_DIFFERENCE = 0.05
"""Between the training losses of a run whose number of workers changed and of one where it did not:
the rounding of sums, as training amplifies it."""

_HEAD = ("fault", "outcome", "s lost", "steps again", "samples lost", "final loss")


@dataclass(frozen=True)
class Cost:
    """One row of the table."""

    fault: str
    outcome: str
    """What the run did about it."""
    seconds_lost: float
    """From the fault until training went on; of a job that was started again, from that start."""
    steps_again: int
    """Optimiser steps done a second time, estimated from when the last checkpoint was."""
    final_loss: float
    undisturbed_loss: float

    def cells(self) -> tuple[str, ...]:
        """The row as text. Equal losses mean equal samples: each has its part in the loss."""
        difference = abs(self.final_loss - self.undisturbed_loss)
        equal = difference <= LARGEST_ELASTIC_DIFFERENCE
        loss = "equal" if equal else f"{self.final_loss:.4f} ({self.undisturbed_loss:.4f})"
        return (
            *(self.fault, self.outcome, f"{self.seconds_lost:.0f}", f"~{self.steps_again}"),
            *("0" if equal else "not shown", loss),
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


def read_losses(run: Path | str, epochs: int = EPOCHS) -> list[float]:
    """Training loss of each epoch; every epoch is there once, in order, or an assertion fails."""
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    return [row["train/loss"] for row in rows]
