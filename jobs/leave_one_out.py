"""Leave each of several stores out in turn: train on the others, and validate on it externally.

    python -m jobs.leave_one_out --stores A,B,C --run URL [--balanced] [settings of train, evaluate]

Writes a run for each, `URL/without-<store>`, and prints the AUROCs on its own test split and on the
store left out. Finished runs are not repeated; they are of the stores whose names and digests are
in `URL/stores.json`, and must have the same settings of training.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from jobs.terminal.entry_point import check_invocation, run_main, tell
from pneumo import storage
from pneumo.command_line import Parser, parse_command_line
from pneumo.config import Config, changed_sections
from pneumo.errors import ConfigError, FinishedError, RunError

_METRICS = "metrics.json"
_EVALUATE_FLAGS = ("--recipe", "--evaluate.", "--tracking.", "--cluster.", "--seed")


def leave_one_out(argv: Sequence[str]) -> None:
    """Train without each store, and evaluate on it.

    Raises ConfigError and StoreError for mistakes in settings and stores, before the first
    training.
    """
    parser = Parser(
        prog="python -m jobs.leave_one_out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stores", required=True, metavar="A,B", help="prepared stores")
    parser.add_argument("--run", required=True, metavar="URL", help="where the runs go")
    options, settings = parser.parse_known_args(argv)
    train_flags, evaluate_flags = split_flags(settings)
    config = parse_command_line("train", ["--store", options.stores, *train_flags]).config
    parse_command_line("evaluate", ["--store", "-", "--run", options.run, *evaluate_flags])
    stores = [storage.normalise(url) for url in options.stores.split(",")]
    if len(stores) < 2:
        raise ConfigError("--stores: give two or more, with commas between")
    names = [storage.last_part(url) for url in stores]
    if len(set(names)) < len(names):
        raise ConfigError("--stores: two have the same name, which names their runs")
    if len(stores) == 2 and "--balanced" in train_flags:
        raise ConfigError("--balanced: has no effect, as each training is on one store")
    from pneumo.dataset.manifest import read_manifest  # slow to import

    digests = {storage.last_part(url): read_manifest(url).digest for url in stores}
    run_urls = [storage.join(storage.normalise(options.run), f"without-{name}") for name in names]
    if not all(storage.exists(_results(run_url)) for run_url in run_urls):
        from pneumo.dataset.joining import check_stores  # slow to import

        check_stores(stores, tell)
    for run_url in run_urls:
        _check_same_settings(run_url, config)
    _check_same_stores(storage.join(storage.normalise(options.run), "stores.json"), digests)
    lines = []
    for left_out, name, run_url in zip(stores, names, run_urls, strict=True):
        others = [url for url in stores if url != left_out]
        matrix = _evaluate_without(left_out, others, run_url, train_flags, evaluate_flags)
        own, external = (_show(matrix[of]["value"]) for of in ("own test", name))
        lines.append(f"{name:24} own test {own}  on {name} {external}")
    print("AUROC of each run, which was trained without the store")
    print("\n".join(lines))


def _check_same_stores(url: str, digests: Mapping[str, str]) -> None:
    """Write the digest of each store to `url`, by name. Raises ConfigError where others are there:
    every run that was trained with them is of another set of stores."""
    found = storage.find_text(url)
    if found is None:
        storage.write_text(url, json.dumps(digests))
    elif (before := json.loads(found)) != digests:
        what = "other contents of" if set(before) == set(digests) else "the stores"
        raise ConfigError(
            f"--run: its runs are of {what} {', '.join(before)}; give another --run for "
            f"{', '.join(digests)}"
        )


def _check_same_settings(run_url: str, config: Config) -> None:
    """Raise RunError where a run is trained, or being trained, with other settings."""
    # Slow to import.
    from pneumo.reporting.tracking.tracked_run import read_config
    from pneumo.training.checkpoints import find_index, find_weights

    before = read_config(run_url)
    changed = [] if before is None else changed_sections(before, find_weights(config))
    if changed and (storage.exists(storage.join(run_url, _METRICS)) or find_index(run_url)):
        raise RunError(
            f"{run_url}: was started with other settings in {', '.join(changed)}; repeat them, or "
            "give another --run"
        )


def _show(auroc: float | None) -> str:
    return "-" if auroc is None else f"{auroc:.3f}"


def _results(run_url: str) -> str:
    return storage.join(run_url, "external", "metrics.json")


def _evaluate_without(
    left_out: str,
    others: Sequence[str],
    run_url: str,
    train_flags: Sequence[str],
    evaluate_flags: Sequence[str],
) -> dict[str, dict[str, float | None]]:
    """The AUROCs, by data set, of a run trained on `others`."""
    # Imported after the command line is parsed, as these take seconds.
    from jobs.evaluation.job import evaluate_run
    from jobs.training.job import train

    store = others[0] if len(others) == 1 else storage.join(run_url, "store")
    evaluate_flags = ["--store", store, "--run", run_url, *evaluate_flags]
    is_evaluated = storage.exists(storage.join(run_url, _METRICS))
    tell(f"leave-one-out: {run_url}{': reused' if is_evaluated else ''}")
    if not is_evaluated:
        places = ["--store", ",".join(others), "--run", run_url]
        try:
            train(check_invocation("train", [*places, *train_flags]))
        except FinishedError:
            tell(f"leave-one-out: {run_url}: its training is reused")
        evaluate_run(check_invocation("evaluate", evaluate_flags))
    if not storage.exists(_results(run_url)):
        evaluate_run(check_invocation("evaluate", [*evaluate_flags, "--external", left_out]))
    matrix: dict[str, dict[str, float | None]]
    matrix = json.loads(storage.read_text(_results(run_url)))["matrix"]
    return matrix


def split_flags(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the trainings, and those of the evaluations, which are never elastic, also where
    a recipe or the environment is."""
    train, evaluate = list[str](), list[str]()
    for flag in _group_flags(settings):
        if not flag[0].startswith("--evaluate."):
            train += flag
        if flag[0].startswith(_EVALUATE_FLAGS) and "cluster.min-workers" not in flag[0]:
            evaluate += flag
    return train, [*evaluate, "--cluster.min-workers", "none"]


def _group_flags(settings: Sequence[str]) -> list[list[str]]:
    """Each flag with its values."""
    flags: list[list[str]] = []
    for word in settings:
        if word.startswith("--") or not flags:
            flags.append([word])
        else:
            flags[-1].append(word)
    return flags


main = partial(run_main, "leave-one-out", leave_one_out)

if __name__ == "__main__":
    sys.exit(main())
