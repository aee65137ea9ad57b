"""Each of several stores left out in turn: train on the others, evaluate on it by what is frozen.

    python -m jobs.leave_one_out --stores A,B,C --run URL [--balanced] [settings of train, evaluate]

Writes a run for each, `URL/without-<store>`, and prints the AUROCs at home and elsewhere. Runs that
are done already are not done again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from jobs.terminal.entry_point import check_invocation, run_main, tell
from pneumo import storage
from pneumo.errors import ConfigError, FinishedError

_OF_EVALUATE = ("--evaluate.", "--tracking.", "--cluster.", "--seed")


def leave_one_out(argv: Sequence[str]) -> None:
    """Train without each store, and evaluate on it. Raises ConfigError for fewer than two."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.leave_one_out",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stores", required=True, metavar="A,B", help="prepared stores")
    parser.add_argument("--run", required=True, metavar="URL", help="where the runs go")
    options, settings = parser.parse_known_args(argv)
    stores = [storage.normalise(url) for url in options.stores.split(",")]
    if len(stores) < 2:
        raise ConfigError("--stores: give two or more, with commas between")
    told = []
    for left in stores:
        name = left.rsplit("/", 1)[-1]
        others = [url for url in stores if url != left]
        run_url = storage.join(storage.normalise(options.run), f"without-{name}")
        matrix = _evaluate_without(left, others, run_url, settings)
        own, elsewhere = matrix["own test"]["value"], matrix[name]["value"]
        told.append(f"{name:24} at home {own:.3f}  on {name} {elsewhere:.3f}")
    print("AUROC of the runs that were trained without")
    print("\n".join(told))


def _evaluate_without(
    left: str, others: Sequence[str], run_url: str, settings: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The AUROCs by set of a run that is trained on `others`."""
    # After the command line is parsed: these take seconds.
    from jobs.evaluation.evaluated_run import METRICS
    from jobs.evaluation.external import FOLDER
    from jobs.evaluation.job import evaluate_run
    from jobs.training.job import train

    store = others[0] if len(others) == 1 else storage.join(run_url, "store")
    pairs = [*_pair(settings)]
    training = [word for pair in pairs if not pair[0].startswith("--evaluate.") for word in pair]
    evaluating = [word for pair in pairs if pair[0].startswith(_OF_EVALUATE) for word in pair]
    results = storage.join(run_url, FOLDER, METRICS)
    where = ["--store", store, "--run", run_url]
    if not storage.exists(storage.join(run_url, METRICS)):
        tell(f"leave-one-out: {run_url}")
        flags = ["--store", ",".join(others), "--run", run_url, *training]
        with suppress(FinishedError):
            train(check_invocation("train", flags))
        evaluate_run(check_invocation("evaluate", [*where, *evaluating]))
    if not storage.exists(results):
        evaluate_run(check_invocation("evaluate", [*where, "--external", left, *evaluating]))
    matrix: dict[str, dict[str, float]] = json.loads(storage.read_text(results))["matrix"]
    return matrix


def _pair(settings: Sequence[str]) -> list[list[str]]:
    """Each flag with what follows it."""
    pairs: list[list[str]] = []
    for word in settings:
        if word.startswith("--") or not pairs:
            pairs.append([word])
        else:
            pairs[-1].append(word)
    return pairs


main = partial(run_main, "leave-one-out", leave_one_out)

if __name__ == "__main__":
    sys.exit(main())
