"""The report page of a search: self-contained, as the evaluation's."""

from collections.abc import Sequence
from typing import Any

from pneumo.reporting.figures import search as drawings
from pneumo.reporting.page.embedding import inline_svg, make_environment
from pneumo.reporting.page.formatting import count, decimal
from pneumo.tuning.objective import describe_objective, name_objective
from pneumo.tuning.search import Search
from pneumo.tuning.trials import State, show_setting

_STATES: dict[State, str] = {
    "finished": "all epochs",
    "stopped": "stopped",
    "diverged": "diverged",
    "failed": "failed",
    "unfinished": "unfinished",
}


def render_search(
    search: Search, *, warnings: Sequence[str], phantoms: bool, created: str, code: str
) -> str:
    """The page. `warnings` say what makes every number doubtful, `phantoms` is the manifest's,
    `created` is the time as text, `code` the revision of the code."""
    config = search.config.tune
    spent, full = search.epochs, len(search.trials) * config.epochs
    environment = make_environment()
    environment.filters["setting"] = show_setting
    return environment.get_template("search.html.j2").render(
        search=search,
        config=config,
        choice=search.choice,
        by_name={trial.name: trial for trial in search.trials},
        created=created,
        code=code,
        warnings=warnings,
        phantoms=phantoms,
        objective=describe_objective(config),
        lead=_summarise(search),
        states=_STATES,
        effort=f"{count(spent, 'epoch')} of {full:,} without stopping ({spent / full:.0%})",
        minutes=decimal(sum(trial.seconds for trial in search.trials) / 60, 1),
        rungs=", ".join(str(rung) for rung in config.rungs),
        drawings=_draw(search),
    )


def _summarise(search: Search) -> str:
    choice, config = search.choice, search.config.tune
    value, interval = choice.trial.objective(config), choice.trial.interval(config)
    assert value is not None, "a trial with all its epochs has an objective"
    between = f" (95 % interval {decimal(interval[0])}–{decimal(interval[1])})" if interval else ""
    sentence = (
        f"Trial {choice.trial.name} is chosen: {choice.reason}. Its {describe_objective(config)} "
        f"is {decimal(value)}{between}."
    )
    confirmed = next((o for o in choice.confirmations if o.name == choice.trial.name), None)
    if confirmed is None:
        return (
            f"{sentence} The best of {count(len(search.trials), 'trial')} on one val split is "
            "partly luck: expect somewhat less."
        )
    spread = "" if confirmed.spread is None else f", standard deviation {decimal(confirmed.spread)}"
    seeds = count(len(confirmed.objectives), "new seed")
    return f"{sentence} Trained again with {seeds} its mean is {decimal(confirmed.mean)}{spread}."


def _draw(search: Search) -> dict[str, dict[str, Any]]:
    objective, n = name_objective(search.config.tune), len(search.trials)
    importance = ", ".join(f"{k} {v:.0%}" for k, v in search.importance.items()) or "not known"
    return {
        "parallel": inline_svg(
            drawings.draw_parallel(search),
            f"Parallel coordinates of {n} trials: the {objective} at the left, then each setting",
        ),
        "contour": inline_svg(
            drawings.draw_contour(search),
            f"{objective} over {' and '.join(drawings.choose_axes(search))}",
        ),
        "learning": inline_svg(
            drawings.draw_learning(search), f"{objective} on val by epoch, {n} trials"
        ),
        "importance": inline_svg(
            drawings.draw_importance(search), f"Importance of each searched setting: {importance}"
        ),
    }
