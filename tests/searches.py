"""Synthetic searches: trials of random settings with realistic learning curves."""

import math
import random
from collections.abc import Mapping

from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.search_space import Scalar
from pneumo.tuning.choice import Confirmation, SettingChoice
from pneumo.tuning.optuna_study import measure_importance
from pneumo.tuning.search import Search
from pneumo.tuning.trials import ERROR, OBJECTIVE, State, Trial, sort_trials


def epoch(number: int, objective: float, error: float = 0.02) -> dict[str, float | None]:
    """Metrics of one epoch."""
    return {
        "epoch": number,
        OBJECTIVE: objective,
        ERROR: error,
        "val/auroc": objective,
        "val/loss": 1 - objective,
        "train/loss": 1 - objective,
        "epoch_s": 2.0,
    }


def trial(
    name: str,
    *objectives: float,
    state: State = "finished",
    error: str | None = None,
    settings: Mapping[str, Scalar] | None = None,
) -> Trial:
    """A trial with these objectives after its epochs."""
    drawn = settings or {"train.lr": 1e-3, "train.pos_weight": 2.0}
    history = tuple(epoch(i, value) for i, value in enumerate(objectives, 1))
    return Trial(name, drawn, 0, state, history, error)


def make_search(num_trials: int = 24, *, confirm: int = 0, **changes: object) -> Search:
    """A search whose objective is best near a learning rate of 5e-4."""
    config = override(Config(), {"tune.num_trials": num_trials, "tune.confirm": confirm, **changes})
    draws = random.Random(3)
    trials = []
    for number in range(1, num_trials + 1):
        lr, weight = 10 ** draws.uniform(-5, -2.53), 10 ** draws.uniform(-0.3, 1)
        top = 0.88 - 0.08 * math.log10(lr / 5e-4) ** 2 - 0.01 * math.log10(weight) ** 2
        epochs = 8 if top > 0.8 else 2
        state: State = "finished" if epochs == 8 else "stopped"
        values = [top - 0.3 * math.exp(-0.6 * e) for e in range(1, epochs + 1)]
        name, drawn = f"t{number:03}", {"train.lr": lr, "train.pos_weight": weight}
        if number == 5:
            trials.append(trial(name, state="diverged", error="the loss is nan", settings=drawn))
            continue
        trials.append(trial(name, *values, state=state, settings=drawn))
    ranked = sort_trials(trials, config.tune)
    confirmations = tuple(
        Confirmation(one.name, (0.85, 0.86, 0.87)[:confirm])
        for one in ranked[: 3 if confirm else 0]
    )
    choice = SettingChoice(
        ranked[1], ranked[0], (ranked[0].name, ranked[1].name), "the simplest", confirmations
    )
    return Search(
        "made-up",
        config,
        "0123456789abcdef",
        ranked,
        choice,
        importance=measure_importance(ranked, config.tune, seed=0),
    )
