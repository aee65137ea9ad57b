"""What judging costs: a full evaluation with 2,000 resamples, and AUROC of a million predictions.

    python -m tests.benchmarks.metrics

Prints one line a measurement: pass or FAIL, what, how many, seconds, peak memory. The scores are
drawn from two normal distributions.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from functools import partial

from threadpoolctl import threadpool_limits

from pneumo.config import EvaluateConfig
from pneumo.evaluation import metrics
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.delong import delong, delong_test
from pneumo.evaluation.evaluation import evaluate
from tests.predictions import make_predictions

NUM_PREDICTIONS = 30_000
NUM_RANKED = 1_000_000
draw = partial(make_predictions, images_per_patient=2)


def measure(what: str, n: int, goal_s: float, work: Callable[[], object]) -> None:
    """Print what `work` took, and whether it met its goal."""
    start, start_cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    verdict = "pass" if seconds < goal_s else "FAIL"
    print(
        f"{verdict}: {what:40} {n:9,} predictions  {seconds:6.1f} s (goal {goal_s:g} s), "
        f"of one CPU {cpu:.1f} s  peak {peak_mb:6.0f} MB",
        flush=True,
    )


def main() -> None:
    """Measure on one thread, as `jobs.evaluate` does."""
    rows, train = draw(NUM_PREDICTIONS), draw(NUM_PREDICTIONS, seed=1)
    config = EvaluateConfig(bootstrap_resamples=2000)
    with threadpool_limits(1):
        measure(
            "full evaluation, 2,000 resamples",
            NUM_PREDICTIONS,
            60,
            lambda: evaluate(rows, config=config, seed=0, train=Metadata.of(train)),
        )
        many, other = draw(NUM_RANKED), draw(NUM_RANKED, seed=1)

        def rank() -> None:
            metrics.roc_points(many.target, many.logit)
            metrics.precision_recall_points(many.target, many.logit)
            delong(many.target, many.logit)
            delong(many.target, many.logit, many.patient)
            delong_test(many.target, many.logit, other.logit, many.patient)

        measure("AUROC, curves, DeLong, paired test", NUM_RANKED, 30, rank)


if __name__ == "__main__":
    main()
