"""Search -> report.html of a search: one self-contained page, as the evaluation's."""

from collections.abc import Sequence
from typing import Any

from pneumo.reporting.figures import search as drawings
from pneumo.reporting.page.embedding import inline, make_environment
from pneumo.reporting.page.formatting import count, decimal
from pneumo.tuning.objective import describe_objective, name_objective
from pneumo.tuning.search import Search, make_recipe
from pneumo.tuning.trials import State, Trial, show_setting

_STATES: dict[State, str] = {
    "finished": "all epochs",
    "stopped": "stopped",
    "diverged": "diverged",
    "failed": "failed",
    "unfinished": "unfinished",
}


def render_search(search: Search, *, warnings: Sequence[str], created: str, code: str) -> str:
    """The page. `warnings` are what makes every number doubtful, `created` when, as
    the reader shall see it, `code` which revision."""
    config, choice = search.config.tune, search.choice
    keys = list(config.space)
    spent, full = search.epochs, len(search.trials) * config.epochs
    return (
        make_environment()
        .get_template("search.html.j2")
        .render(
            search=search,
            created=created,
            code=code,
            warnings=warnings,
            objective=describe_objective(config),
            lead=_summarise(search),
            space=[
                (key, domain.kind.replace("_", " "), _show_all(domain.values))
                for key, domain in config.space.items()
            ],
            keys=keys,
            rows=[_describe(trial, search) for trial in search.trials],
            confirmations=[
                {
                    "name": one.name,
                    "n": len(one.objectives),
                    "mean": decimal(one.mean, 4),
                    "spread": "" if one.spread is None else decimal(one.spread, 4),
                    "searched": decimal(_objective(_by_name(search, one.name), search), 4),
                    "taken": one.name == choice.trial.name,
                }
                for one in choice.confirmations
            ],
            effort=f"{count(spent, 'epoch')} of {full:,} without stopping ({spent / full:.0%})",
            minutes=decimal(sum(trial.seconds for trial in search.trials) / 60, 1),
            rungs=", ".join(str(rung) for rung in config.rungs),
            drawings=_draw(search),
            recipe=make_recipe(search.config, choice.trial.settings),
            settings=_describe_settings(choice.trial, keys),
        )
    )


def _summarise(search: Search) -> str:
    choice, config = search.choice, search.config.tune
    value, interval = _objective(choice.trial, search), choice.trial.interval(config)
    between = f" (95 % interval {decimal(interval[0])}–{decimal(interval[1])})" if interval else ""
    sentence = (
        f"Trial {choice.trial.name} is taken: {choice.reason}. Its {describe_objective(config)} is "
        f"{decimal(value)}{between}."
    )
    confirmed = next((o for o in choice.confirmations if o.name == choice.trial.name), None)
    if confirmed is None:
        return (
            f"{sentence} The best of {count(len(search.trials), 'trial')} on one val split is "
            "partly luck: expect somewhat less, or confirm it with new seeds (tune.confirm)."
        )
    spread = "" if confirmed.spread is None else f", standard deviation {decimal(confirmed.spread)}"
    seeds = count(len(confirmed.objectives), "new seed")
    return f"{sentence} Trained again with {seeds} its mean is {decimal(confirmed.mean)}{spread}."


def _draw(search: Search) -> dict[str, dict[str, Any]]:
    objective, n = name_objective(search.config.tune), len(search.trials)
    importance = ", ".join(f"{k} {v:.0%}" for k, v in search.importance.items()) or "not known"
    return {
        "parallel": inline(
            drawings.draw_parallel(search),
            f"Parallel coordinates of {n} trials: the {objective} at the left, then each setting",
        ),
        "contour": inline(
            drawings.draw_contour(search),
            f"{objective} over {' and '.join(drawings.choose_axes(search))}",
        ),
        "learning": inline(
            drawings.draw_learning(search), f"{objective} on val by epoch, {n} trials"
        ),
        "importance": inline(
            drawings.draw_importance(search), f"Importance of each searched setting: {importance}"
        ),
    }


def _describe(trial: Trial, search: Search) -> dict[str, Any]:
    config, choice = search.config.tune, search.choice
    value, interval = trial.objective(config), trial.interval(config)
    return {
        "name": trial.name,
        "taken": trial.name == choice.trial.name,
        "tie": trial.name in choice.ties,
        "state": _STATES[trial.state],
        "error": trial.error,
        "objective": "" if value is None else decimal(value, 4),
        "interval": f"{decimal(interval[0])}–{decimal(interval[1])}" if interval else "",
        "epochs": trial.epochs,
        "settings": _describe_settings(trial, list(config.space)),
    }


def _describe_settings(trial: Trial, keys: list[str]) -> list[str]:
    return [show_setting(trial.settings[key]) for key in keys]


def _show_all(values: tuple[Any, ...]) -> str:
    return (
        " – ".join(map(show_setting, values))
        if len(values) == 2
        else ", ".join(map(show_setting, values))
    )


def _objective(trial: Trial, search: Search) -> float:
    value = trial.objective(search.config.tune)
    assert value is not None
    return value


def _by_name(search: Search, name: str) -> Trial:
    return next(trial for trial in search.trials if trial.name == name)
