"""The functions that `fit` calls while it trains, and what it passes to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pneumo.network.backbones import Initialisation
from pneumo.network.scoring import Scores

Metrics = dict[str, float | None]
"""By name; None where undefined."""


@dataclass(frozen=True)
class Start:
    """Where an attempt at a run starts."""

    initialisation: Initialisation
    history: tuple[Metrics, ...]
    """`Epoch.metrics` of each completed epoch."""
    step: int
    """Completed steps of the current epoch."""
    steps: int
    """Steps per epoch."""


@dataclass(frozen=True)
class Epoch:
    """A completed epoch."""

    number: int
    """Counted from 1."""
    metrics: Metrics
    """train/loss; data/samples, the number of samples trained on; lr and grad_norm at its end;
    val/loss, val/auroc, val/accuracy, val/precision, val/recall (at p = 0.5) and the same as
    val/ema_… for the averaged weights; epoch_s, and the metrics of `StepTimes.read`."""


@dataclass(frozen=True)
class StepProgress:
    """Progress within an epoch."""

    epoch: int
    """Counted from 1."""
    step: int
    """Completed steps."""
    steps: int
    """Steps per epoch."""
    metrics: Metrics
    """Since the last report: train/loss, lr, grad_norm and the metrics of `StepTimes.read`."""


@dataclass(frozen=True)
class Callbacks:
    """Functions of the caller; each is called on every rank.

    >>> callbacks = pneumo.Callbacks(on_epoch=lambda epoch: print(epoch.number, epoch.metrics))
    """

    on_start: Callable[[Start], None] = lambda start: None
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None
    on_progress: Callable[[StepProgress], None] = lambda progress: None
    """Called about once a second, and at the end of an epoch."""
    tell: Callable[[str], None] = lambda line: None
    """Takes one line for the person: how each split is loaded, warnings, recovered failures."""
    extra_metrics: Callable[[Scores], Mapping[str, float | None]] = lambda scores: {}
    """More metrics of an epoch, from the scores of all of val in the store's order. With EMA they
    are the scores of the averaged weights."""
    should_stop: Callable[[], bool] = lambda: False
    """Called after each step and each batch of val. True on one rank ends the run on all ranks,
    with a checkpoint and PreemptedError."""
