"""What judging costs: a full evaluation of many predictions, and AUROC of a million.

    python -m tests.benchmarks.metrics [--n 30000 150000 1000000] [--resamples 2000] [--workers 2]

Prints one line a measurement: what, how many, seconds, of one CPU, peak memory. Half of the
predictions are val, half test, two a patient; the scores are drawn from two normal distributions.
With `--workers` the resamples are shared out over so many Ray workers, as `jobs.evaluate` does.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

from threadpoolctl import threadpool_limits

from jobs.evaluation.ray_resampling import map_on_workers
from jobs.ray_cluster.session import ray_session
from pneumo.config import ClusterConfig, EvaluateConfig
from pneumo.evaluation import metrics
from pneumo.evaluation.baselines import Metadata
from pneumo.evaluation.bootstrap import MapBlocks
from pneumo.evaluation.delong import delong, delong_test
from pneumo.evaluation.evaluation import evaluate
from tests.predictions import make_predictions

GOALS_S = {30_000: 60.0, 1_000_000: 120.0}
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
        f"of this process's CPU {cpu:.1f} s  peak {peak_mb:6.0f} MB",
        flush=True,
    )


def measure_evaluation(n: int, resamples: int, map_blocks: MapBlocks) -> None:
    """All tables of `n` predictions."""
    rows, train = draw(n), draw(min(n, 30_000), seed=1)
    config = EvaluateConfig(bootstrap_resamples=resamples)
    columns = Metadata.of(train)
    work = partial(evaluate, rows, config=config, seed=0, train=columns, map_blocks=map_blocks)
    measure(f"full evaluation, {resamples:,} resamples", n, GOALS_S.get(n, 120.0), work)


def measure_ranking() -> None:
    """Curves and DeLong's tests of a million predictions."""
    many, other = draw(NUM_RANKED), draw(NUM_RANKED, seed=1)

    def rank() -> None:
        metrics.roc_points(many.target, many.logit)
        metrics.precision_recall_points(many.target, many.logit)
        delong(many.target, many.logit)
        delong(many.target, many.logit, many.patient)
        delong_test(many.target, many.logit, other.logit, many.patient)

    measure("AUROC, curves, DeLong, paired test", NUM_RANKED, 30, rank)


def main() -> None:
    """Measure on one thread a process, as `jobs.evaluate` does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[30_000])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0, help="Ray workers; 0: this process")
    arguments = parser.parse_args()
    with threadpool_limits(1):
        if arguments.workers == 0:
            for n in arguments.n:
                measure_evaluation(n, arguments.resamples, map)
            measure_ranking()
            return
        with ray_session():
            map_blocks = partial(map_on_workers, ClusterConfig(num_workers=arguments.workers))
            for n in arguments.n:
                measure_evaluation(n, arguments.resamples, map_blocks)


if __name__ == "__main__":
    main()
