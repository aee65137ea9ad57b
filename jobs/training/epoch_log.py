"""The messages of rank 0 to the driver during training, and how the driver shows them."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
import ray.train
from ray.util.metrics import Gauge

from jobs.terminal.progress import Progress, tell_above_bar
from jobs.training.messages import WorkerChannel
from pneumo.loading.sample_order import World
from pneumo.training.callbacks import Callbacks, Epoch, Start, StepProgress

_MIN_SHOWN_DATA_WAIT = 0.05
"""A smaller fraction of the time spent waiting for data is not shown."""
_POLL_INTERVAL_S = 0.3
"""At most this long after its end, training is seen to have ended."""

Message = str | Start | StepProgress | Epoch


def worker_callbacks(channel: WorkerChannel | None, world: World) -> Callbacks:
    """Callbacks of a Ray Train worker: rank 0 sends messages to the driver, all report to Ray."""

    def tell(message: Message) -> None:
        if channel is not None and world.rank == 0:
            channel.put(message)

    # For Prometheus: Ray exports them on each node's metrics port, as ray_pneumo_….
    steps = Gauge("pneumo_train_steps", "Steps done, of all epochs")
    wait = Gauge("pneumo_train_data_wait", "Fraction of the time that training waits for data")

    def on_progress(progress: StepProgress) -> None:
        steps.set((progress.epoch - 1) * progress.steps + progress.step)
        if (waited := progress.metrics["data_wait"]) is not None:
            wait.set(waited)
        tell(progress)

    def on_epoch(epoch: Epoch) -> None:
        tell(epoch)
        # A barrier over the ranks; Ray's dashboard and Tune get the epoch's metrics here. It gets
        # no checkpoint: ours are the same under torchrun, and one index lists them.
        ray.train.report({k: v for k, v in epoch.metrics.items() if v is not None})

    return Callbacks(on_start=tell, on_progress=on_progress, on_epoch=on_epoch, tell=tell)


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


def describe_progress(progress: StepProgress) -> str:
    """The text behind the progress bar."""
    loss, rate, wait = (progress.metrics[n] for n in ("train/loss", "images_per_s", "data_wait"))
    parts = [
        "" if loss is None else f"loss {loss:.3f}",
        "" if rate is None else f"{rate:.0f} images/s",
        "" if wait is None or wait < _MIN_SHOWN_DATA_WAIT else f"{wait:.0%} waiting for data",
    ]
    return ", ".join(part for part in parts if part)


class EpochDisplay:
    """Shows rank 0's messages. `take(timeout_s)` returns the new ones, waiting for the first."""

    def __init__(self, take: Callable[[float], list[Message]], *, epochs: int) -> None:
        self.take, self.epochs = take, epochs
        self.shown_epochs = 0
        self.done_steps = 0
        """Steps of the run, by the latest message."""
        self.progress: Progress | None = None

    def follow(self, training: Future[Any]) -> None:
        """Show messages until `training` has ended; raises what it raised."""
        try:
            while True:
                ended = training.done()
                received = self._receive(0.0 if ended else _POLL_INTERVAL_S)
                for message in received:
                    self._show(message)
                if ended and not received:
                    break
        finally:
            self._end_progress()
        training.result()

    def _receive(self, timeout_s: float) -> list[Message]:
        try:
            return self.take(timeout_s)
        except ray.exceptions.RayError:  # the channel is lost; `training` will end with an error
            time.sleep(timeout_s)
            return []

    def _show(self, message: Message) -> None:
        if isinstance(message, str):
            tell_above_bar(message)
        elif isinstance(message, Start):
            self._begin(message)
        elif isinstance(message, StepProgress):
            self.done_steps = (message.epoch - 1) * message.steps + message.step
            if self.progress is None:
                total = self.epochs * message.steps
                self.progress = Progress("train", total, "steps", initial=self.done_steps)
            self.progress.advance_to(self.done_steps, describe_progress(message))
        elif message.number > self.shown_epochs:  # after a restart an epoch may come twice
            self.shown_epochs = message.number
            tell_above_bar(describe_epoch(message, self.epochs))

    def _begin(self, start: Start) -> None:
        warning = "warning: " if start.initialisation.fell_back else ""
        repeated = self.done_steps - (len(start.history) * start.steps + start.step)
        suffix = f"; {repeated} steps again" if repeated > 0 else ""
        tell_above_bar(f"{warning}model: {start.initialisation.message}{suffix}")
        self.shown_epochs = max(self.shown_epochs, len(start.history))
        # The next attempt has another speed, and so another bar.
        self._end_progress()

    def _end_progress(self) -> None:
        if self.progress is not None:
            self.progress.__exit__(None, None, None)
            self.progress = None
