"""What a training tells its caller, and what it asks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pneumo.network.backbones import Initialisation
from pneumo.network.scoring import Scores

Metrics = dict[str, float | None]
"""By name; None where undefined."""


@dataclass(frozen=True)
class Start:
    """Where an attempt at a run begins."""

    initialisation: Initialisation
    history: tuple[Metrics, ...]
    """Of the epochs that are complete: `Epoch.metrics` of each."""
    step: int
    """Steps done of the epoch after them."""
    steps: int
    """Of an epoch."""


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch."""

    number: int
    """Counted from 1."""
    metrics: Metrics
    """train/loss; data/samples, what its steps were fed; lr and grad_norm at its end; val/loss,
    val/auroc, val/accuracy, val/precision, val/recall (at p = 0.5) and the same as val/ema_… of the
    averaged weights; epoch_s, and what `StepTimes.read` gives."""


@dataclass(frozen=True)
class StepProgress:
    """How far training has come within an epoch."""

    epoch: int
    """Counted from 1."""
    step: int
    """Steps done of it."""
    steps: int
    metrics: Metrics
    """Since the last one: train/loss, lr, grad_norm and what `StepTimes.read` gives."""


@dataclass(frozen=True)
class Callbacks:
    """What the caller wants to hear; each is called on every rank.

    >>> callbacks = pneumo.Callbacks(on_epoch=lambda epoch: print(epoch.number, epoch.metrics))
    """

    on_start: Callable[[Start], None] = lambda start: None
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_progress: Callable[[StepProgress], None] = lambda progress: None
    """About once a second, and at the end of an epoch."""
    tell: Callable[[str], None] = lambda line: None
    """Takes one line for the person: how each split is fed, what went wrong and was mended."""
    extra_metrics: Callable[[Scores], Mapping[str, float | None]] = lambda scores: {}
    """More metrics of an epoch: from all of val's scores, in the store's order, by the weights that
    are scored with."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after each step and each batch of val. One rank's yes ends the run on all, with a
    checkpoint and PreemptedError."""
