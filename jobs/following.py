"""What rank 0 tells the driver while it trains, and what the driver shows and logs of it.

W&B is written by the driver alone: `wandb.init` in a worker would double epochs after a restart.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty
from typing import Any

import ray
import ray.train
from ray.util.queue import Queue

from jobs.command import say
from jobs.progress import Progress
from pneumo.model import Initialisation
from pneumo.partition import World
from pneumo.tracking import Tracker
from pneumo.train import Epoch, Hooks, Pace

_WORTH_SAYING = 0.05
"""Share of the time that waiting for data may take unnoticed."""


@dataclass(frozen=True)
class Started:
    """The network is ready; training goes on after `finished_epochs`."""

    initialisation: Initialisation
    finished_epochs: int


@dataclass(frozen=True)
class Stepped:
    """Steps done, of all in the run."""

    done: int
    total: int
    pace: Pace


def worker_hooks(messages: Queue | None, world: World, *, epochs: int) -> Hooks:
    """The hooks of a Ray Train worker: rank 0 tells the driver, every rank reports to Ray."""

    def tell(message: str | Started | Stepped | Epoch) -> None:
        if messages is not None and world.rank == 0:
            messages.put(message)

    def on_pace(pace: Pace) -> None:
        tell(Stepped((pace.epoch - 1) * pace.steps + pace.step, epochs * pace.steps, pace))

    def on_epoch(epoch: Epoch) -> None:
        tell(epoch)
        # A barrier over the ranks; Ray's dashboards and Tune hear of the epoch here. Checkpoints
        # are our own: they are the same under torchrun, and one index vouches for them.
        ray.train.report({k: v for k, v in epoch.metrics.items() if v is not None})

    return Hooks(
        on_start=lambda initialisation, finished: tell(Started(initialisation, finished)),
        on_pace=on_pace,
        on_epoch=on_epoch,
        on_note=tell,
    )


def describe_epoch(epoch: Epoch, epochs: int) -> str:
    """One line for the terminal."""

    def number(name: str) -> str:
        value = epoch.metrics[name]
        return "  -  " if value is None else f"{value:.3f}"

    return (
        f"epoch {epoch.number:3}/{epochs}  loss {number('train/loss')}  val loss "
        f"{number('val/loss')}  AUROC {number('val/auroc')}  accuracy {number('val/accuracy')}  "
        f"precision {number('val/precision')}  recall {number('val/recall')}  "
        f"{epoch.metrics['images_per_s'] or 0:.0f} images/s"
    )


def describe_pace(pace: Pace) -> str:
    """What stands behind the progress bar."""
    loss, rate, wait = (pace.metrics[n] for n in ("train/loss", "images_per_s", "data_wait"))
    parts = [
        "" if loss is None else f"loss {loss:.3f}",
        "" if rate is None else f"{rate:.0f} images/s",
        "" if wait is None or wait < _WORTH_SAYING else f"{wait:.0%} waiting for data",
    ]
    return ", ".join(part for part in parts if part)


class Follower:
    """Shows rank 0's messages and logs its epochs."""

    def __init__(self, messages: Queue, tracker: Tracker, *, epochs: int) -> None:
        self.messages, self.tracker, self.epochs = messages, tracker, epochs
        self.logged = 0
        self.progress: Progress | None = None

    def follow(self, training: Future[Any]) -> None:
        """Return when `training` has ended and its last message is shown; raises what it raised."""
        try:
            while True:
                ended = training.done()
                message = self._receive()
                if message is not None:
                    self._show(message)
                elif ended:
                    break
        finally:
            if self.progress is not None:
                self.progress.__exit__(None, None, None)
        training.result()

    def _receive(self) -> Any:
        try:
            return self.messages.get(timeout=0.3)
        except Empty:
            return None
        except ray.exceptions.RayError:  # the queue's node is gone; the training's end will tell
            time.sleep(0.3)
            return None

    def _show(self, message: str | Started | Stepped | Epoch) -> None:
        if isinstance(message, str):
            self._write(message)
        elif isinstance(message, Started):
            warning = "warning: " if message.initialisation.fell_back else ""
            self._write(f"{warning}model: {message.initialisation.message}")
        elif isinstance(message, Stepped):
            if self.progress is None:
                self.progress = Progress("train", message.total, "steps")
            self.progress.advance_to(message.done, describe_pace(message.pace))
        elif message.number > self.logged:  # after a restart an epoch may come twice
            self.logged = message.number
            self._write(describe_epoch(message, self.epochs))
            metrics = {k: v for k, v in message.metrics.items() if v is not None}
            self.tracker.log(metrics, epoch=message.number)

    def _write(self, line: str) -> None:
        if self.progress is None:
            say(line)
        else:
            self.progress.write(line)
