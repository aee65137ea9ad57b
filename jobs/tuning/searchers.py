"""Tune searchers and a scheduler that resume: Optuna or a fixed list chooses the next trial, ASHA
stops trials; each knows the trials of the search before an interruption. A limiter lets as many run
as fit."""

import hashlib
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from jobs.terminal.entry_point import tell
from jobs.tuning.trial_judge import METRIC
from jobs.tuning.trial_records import write_begun
from pneumo.config import REDUCTION_FACTOR, Config, TuneConfig
from pneumo.search_space import Scalar
from pneumo.tuning.objective import smooth
from pneumo.tuning.optuna_study import to_distribution
from pneumo.tuning.trials import OBJECTIVE, Trial

_STARTUP_DIVISOR = 4
"""TPE draws the first quarter of the trials at random, at least 4 and at most 10."""

_MAX_ASKED, _ASKED_AT_RANDOM = 200, 180
"""How often a setting is asked for that is not known yet, and how many of these times at random."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial to train."""

    name: str
    settings: Mapping[str, Scalar]
    seed: int


def list_grid(config: Config) -> list[PlannedTrial]:
    """Every setting of the grid, shuffled by the seed: in the grid's own order, ASHA would compare
    only similar settings."""
    space = config.tune.space
    settings = [
        dict(zip(space, values, strict=True))
        for values in product(*(domain.grid() for domain in space.values()))
    ]
    random.Random(f"pneumo/grid/{config.seed}").shuffle(settings)
    return [PlannedTrial(name_trial(i), each, config.seed) for i, each in enumerate(settings, 1)]


def name_trial(number: int) -> str:
    """t001, t002 …"""
    return f"t{number:03}"


class RoomLimiter(ConcurrencyLimiter):  # type: ignore[misc]
    """Suggests a trial while the cluster has room for it; nodes join and leave meanwhile."""

    def __init__(self, searcher: Searcher, count_room: Callable[[], int]) -> None:
        """`count_room`: how many trials the cluster has room for."""
        self.max_concurrent: int = max(count_room(), 1)
        super().__init__(searcher, self.max_concurrent)
        self.count_room = count_room

    def suggest(self, trial_id: str) -> Any:
        room = max(self.count_room(), 1)
        if room > self.max_concurrent:
            tell(f"tune: there is room for {room} trials at a time")
        self.max_concurrent = room
        return super().suggest(trial_id)


class FixedListSearcher(Searcher):  # type: ignore[misc]
    """Suggests the trials of a list, in its order."""

    def __init__(self, planned: Sequence[PlannedTrial], run_url: str) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.left, self.run_url = list(planned), run_url

    def suggest(self, trial_id: str) -> Any:
        if not self.left:
            return Searcher.FINISHED
        trial = self.left.pop(0)
        write_begun(self.run_url, trial.name, trial.settings, trial.seed)
        return asdict(trial)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        pass

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the remaining trials follow from the trials' own records."""


class OptunaSearcher(FixedListSearcher):
    """Suggests unfinished trials first, then settings of Optuna, which learns from ended ones; none
    twice, as with the same seed it would be the same training. A small space ends early."""

    def __init__(
        self, config: Config, before: Mapping[str, Trial], run_url: str, *, worst: float
    ) -> None:
        """`before`: trials so far; `worst`: the objective of a setting that cannot be trained."""
        unfinished = [trial for trial in before.values() if trial.is_open]
        super().__init__([PlannedTrial(t.name, t.settings, t.seed) for t in unfinished], run_url)
        self.config, self.next_number = config, len(before) + 1
        self.space = {key: to_distribution(domain) for key, domain in config.tune.space.items()}
        self.study = optuna.create_study(direction="maximize")
        self.asked: dict[str, optuna.Trial] = {}
        for trial in before.values():
            if not trial.is_open:
                self.study.add_trial(_as_optuna(trial, self.space, config.tune, worst))
        for trial in unfinished:
            self.study.enqueue_trial(dict(trial.settings))

    def suggest(self, trial_id: str) -> Any:
        asked = self._ask()
        if asked is None:
            return Searcher.FINISHED
        self.asked[trial_id] = asked
        if not self.left:
            name = name_trial(self.next_number)
            self.left.append(PlannedTrial(name, dict(asked.params), self.config.seed))
            self.next_number += 1
        return super().suggest(trial_id)

    def _ask(self) -> optuna.Trial | None:
        """The next unfinished trial, or a setting that is not known; None where none is found."""
        for left in range(_MAX_ASKED, 0, -1):
            known = self.study.get_trials(deepcopy=False)
            at_random = left <= _ASKED_AT_RANDOM
            self.study.sampler = _make_sampler(self.config, len(known), at_random=at_random)
            asked = self.study.ask(fixed_distributions=self.space)
            if self.left or all(asked.params != trial.params for trial in known):
                return asked
            self.study.tell(asked, state=TrialState.FAIL)
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        asked = self.asked.pop(trial_id)
        if error or not result or METRIC not in result:
            self.study.tell(asked, state=TrialState.FAIL)
        elif int(result["epoch"]) < self.config.tune.epochs and "error" not in result:
            # As pruned: Optuna ranks it below all trials that came further.
            asked.report(result[METRIC], int(result["epoch"]))
            self.study.tell(asked, state=TrialState.PRUNED)
        else:
            self.study.tell(asked, result[METRIC])


def _make_sampler(config: Config, number: int, *, at_random: bool) -> optuna.samplers.BaseSampler:
    """The sampler for the trial of this number, with a seed of its own, so that a resumed search
    does not draw the same settings again."""
    digest = hashlib.blake2b(f"pneumo/tune/{config.seed}/{number}".encode(), digest_size=4)
    seed = int.from_bytes(digest.digest(), "little")
    if at_random or config.tune.algorithm == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = min(max(config.tune.num_trials // _STARTUP_DIVISOR, 4), 10)
    with warnings.catch_warnings():
        # Running trials count as poor ones, so that concurrent trials are not alike.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def _as_optuna(
    trial: Trial, space: Mapping[str, Any], config: TuneConfig, worst: float
) -> optuna.trial.FrozenTrial:
    value = trial.objective(config)
    known: dict[str, Any] = {"params": dict(trial.settings), "distributions": dict(space)}
    if trial.state == "stopped" and value is not None:
        known |= {"state": TrialState.PRUNED, "intermediate_values": {trial.epochs: value}}
        return optuna.trial.create_trial(**known)
    return optuna.trial.create_trial(value=value if trial.state == "finished" else worst, **known)


class ResumableAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that knows the results of the trials before an interruption.

    Tune does not keep a scheduler's state: trials would pass rungs as if no other had reached them.
    """

    def __init__(self, config: TuneConfig, before: Mapping[str, Trial]) -> None:
        super().__init__(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=config.epochs,
            grace_period=1,
            reduction_factor=REDUCTION_FACTOR,
        )
        self.smoothing_epochs = config.smoothing_epochs
        self.open = {name: trial for name, trial in before.items() if trial.is_open}
        for trial in before.values():
            if not trial.is_open:
                stub = SimpleNamespace(trial_id=trial.name)
                super().on_trial_add(None, stub)
                self._replay(stub, trial)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        before = self.open.get(trial.config["name"])
        if before is not None:
            self._replay(trial, before)

    def _replay(self, trial: Any, before: Trial) -> None:
        values = [record[OBJECTIVE] for record in before.history]
        for epoch in range(1, len(values) + 1):
            objective = smooth([v for v in values[:epoch] if v is not None], self.smoothing_epochs)
            super().on_trial_result(None, trial, {"epoch": epoch, METRIC: objective})
