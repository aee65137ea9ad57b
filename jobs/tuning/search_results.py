"""The results of a search: a printed table, trials.parquet, report.html and, last, best.toml."""

import time

import tomli_w

from jobs.terminal.entry_point import tell
from jobs.tuning.search_wandb import BEST, REPORT, TRIALS
from pneumo import storage
from pneumo.dataset.manifest import Manifest
from pneumo.reporting.page.search_page import render_search
from pneumo.tuning.search import Search, make_recipe, to_parquet
from pneumo.tuning.trials import describe_settings
from pneumo.version import describe_code

_MAX_SHOWN_TRIALS = 20


def print_search(search: Search) -> None:
    """Print the best trials, the confirmation, and the chosen setting."""
    config = search.config.tune
    print("trial       objective  95 % interval     epochs  settings")
    for trial in search.trials[:_MAX_SHOWN_TRIALS]:
        value, interval = trial.objective(config), trial.interval(config)
        score = "-" if value is None else f"{value:.4f}"
        between = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "-"
        ended = "" if trial.state in ("finished", "stopped") else f"  {trial.state}: {trial.error}"
        stopped = " stopped" if trial.state == "stopped" else ""
        print(
            f"{trial.name:<10}  {score:<9}  {between:<16}  {trial.epochs:<6}  "
            f"{describe_settings(trial.settings)}{stopped}{ended}"
        )
    if len(search.trials) > _MAX_SHOWN_TRIALS:
        print(f"and {len(search.trials) - _MAX_SHOWN_TRIALS} more in {TRIALS}")
    for one in search.choice.confirmations:
        spread = "" if one.spread is None else f" ± {one.spread:.4f} (standard deviation)"
        seeds = f"{len(one.objectives)} new seed{'s' if len(one.objectives) > 1 else ''}"
        print(f"confirmed {one.name}: mean {one.mean:.4f}{spread} over {seeds}")
    choice = search.choice
    print(f"chosen {choice.trial.name}: {choice.reason}")
    if search.warning:
        tell(f"warning: {search.warning}")


def write_results(search: Search, manifest: Manifest, run_url: str) -> None:
    """Write the results to the run; the recipe last, which marks the search as finished."""
    page = render_search(
        search,
        warnings=[text for text in (search.warning, manifest.audit.warning) if text],
        phantoms=manifest.phantoms,
        created=time.strftime("%Y-%m-%d %H:%M"),
        code=describe_code(),
    )
    storage.write_bytes(storage.join(run_url, TRIALS), to_parquet(search))
    storage.write_text(storage.join(run_url, REPORT), page)
    storage.write_text(storage.join(run_url, BEST), describe_recipe(search))


def describe_recipe(search: Search) -> str:
    """best.toml: the settings as a recipe, with comments on their origin."""
    choice, config = search.choice, search.config.tune
    value, interval = choice.trial.objective(config), choice.trial.interval(config)
    between = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    lines = [
        f"Found by jobs.tune in {search.name}: trial {choice.trial.name} of {len(search.trials)}, "
        f"{config.objective} {value:.4f}{between} on val.",
        f"Chosen as {choice.reason}.",
        *(
            f"Trained again with {len(one.objectives)} new seeds: mean {one.mean:.4f}."
            for one in choice.confirmations
            if one.name == choice.trial.name
        ),
        *([] if search.warning is None else [f"Warning: {search.warning}."]),
        f"Data set {search.manifest_digest[:12]}, code {describe_code()}; trials had "
        f"{config.epochs} epochs.",
    ]
    head = "".join(f"# {line}\n" for line in lines)
    return head + tomli_w.dumps(make_recipe(search.config, choice.trial.settings))
