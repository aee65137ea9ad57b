"""A live table of one user's runs on a cluster, shown until all have ended.

A run's state comes from the cluster; its progress is read from its folder, with the credentials of
this machine.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from cluster import run_folder
from cluster.targets import RETRY_TIMEOUT_S, JobState, OutOfReachError, Target, Write
from pneumo.errors import PneumoError

INTERVAL_S = 5.0
_HEADER = ("run", "state", "epoch", "val AUROC", "images/s", "data wait", "time left", "")


def watch(
    target: Target,
    ids: Sequence[str],
    owner: str,
    show: Write,
    tell: Write,
    *,
    interval_s: float = INTERVAL_S,
    retry_timeout_s: float = RETRY_TIMEOUT_S,
) -> int:
    """Show these jobs, or without `ids` all jobs of `owner`, also new ones, until all have ended;
    returns the highest of their exit codes.

    `show` gets the table whenever it has changed, `tell` other messages. Raises ConfigError for an
    unknown job, OutOfReachError where the cluster is unreachable for `retry_timeout_s`.
    """
    view, shown, seen_s, was_away = _View(), "", time.monotonic(), False
    view.rows = {job_id: target.state(job_id) for job_id in ids}  # shown even if it has ended
    while True:
        try:
            states = target.list()
        except OutOfReachError as error:
            if time.monotonic() - seen_s > retry_timeout_s:
                raise
            tell(f"{str(error).split(';')[0]}; trying again")
            was_away = True
            time.sleep(interval_s)
            continue
        seen_s = time.monotonic()
        mine = [s for s in states if s.id in ids or (not ids and s.is_ours and s.owner == owner)]
        view.update(mine, was_away=was_away)
        was_away = False
        if not view.rows:
            tell(f"no job of {owner} is running")
            return 0
        table = view.draw()
        if table != shown:
            show(table)
        shown = table
        if all(state.has_ended for state in view.rows.values()):
            return max(state.exit_code for state in view.rows.values())
        time.sleep(interval_s)


@dataclass
class _View:
    """The jobs that are shown, and the last progress read of each."""

    rows: dict[str, JobState] = field(default_factory=dict)
    progress: dict[str, run_folder.Progress] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)
    """Jobs whose folder could not be read; it is not tried again, as each try would take long."""

    def update(self, states: Sequence[JobState], *, was_away: bool) -> None:
        """Update the rows; a job that had ended before it was first seen gets none. `was_away`: the
        cluster was out of reach since the last update."""
        now = {state.id: state for state in states}
        for job_id, state in self.rows.items():
            if job_id not in now and not state.has_ended:  # on Kubernetes, its RayJob was deleted
                ended = run_folder.judge_deleted(job_id, state.log_folder, was_away=was_away)
                self.rows[job_id] = replace(ended, target=state.target)
        self.rows |= {k: s for k, s in now.items() if k in self.rows or not s.has_ended}

    def draw(self) -> str:
        """The table, after reading the progress of the running trainings."""
        trainings = [
            state
            for state in self.rows.values()
            if state.phase == "running"
            and "jobs.train" in state.entrypoint.split()  # an evaluation's run is trained before
            and state.id not in self.unreadable
        ]
        with ThreadPoolExecutor(max_workers=8) as pool:
            list(pool.map(self._read, trainings))
        rows = [_HEADER, *(self._row(state) for state in self.rows.values())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
        return "\n".join(line.rstrip() for line in lines)

    def _read(self, state: JobState) -> None:
        try:
            found = run_folder.read_progress(state.target)
        except (TimeoutError, PneumoError):
            self.unreadable.add(state.id)
        else:
            if found is not None:
                self.progress[state.id] = found

    def _row(self, state: JobState) -> tuple[str, ...]:
        last = state.why or (f"exit code {state.exit_code}" if state.has_ended else "")
        if state.id in self.unreadable:
            last = f"{last}; its folder cannot be read from here".removeprefix("; ")
        known = self.progress.get(state.id)
        if known is None:
            return (state.id, state.phase, *("-",) * 5, last)
        left_s = 0.0 if state.has_ended else known.left_s
        minutes, seconds = (0, 0) if left_s is None else divmod(round(left_s), 60)
        return (
            state.id,
            state.phase,
            f"{known.epoch}/{known.epochs}",
            "-" if known.val_auroc is None else f"{known.val_auroc:.3f}",
            "-" if known.images_per_s is None else f"{known.images_per_s:.0f}",
            "-" if known.data_wait is None else f"{known.data_wait:.0%}",
            "-" if left_s is None else f"{minutes} min {seconds:02} s",
            last,
        )
