"""The resamples of an evaluation, computed by the cluster's workers."""

from collections.abc import Callable, Iterator
from functools import partial

import ray
from threadpoolctl import threadpool_limits

from jobs.ray_cluster.spreading import spread
from jobs.terminal.progress import Progress
from pneumo.config import ClusterConfig
from pneumo.evaluation.bootstrap import BlockValues, MapBlocks, ResampleBlock, ResampleBlocks

_FEW = 20_000
"""Predictions below which it takes longer to send the work than to do it."""


def choose_map(config: ClusterConfig, num_predictions: int) -> MapBlocks:
    """How blocks of resamples are computed: of few predictions in this process, else by the
    workers. The results are the same."""
    return map if num_predictions < _FEW else partial(map_on_workers, config)


def map_on_workers(
    config: ClusterConfig, function: Callable[[ResampleBlock], BlockValues], blocks: ResampleBlocks
) -> Iterator[BlockValues]:
    """A `MapBlocks` on all CPUs of Ray's workers, a task for each block: the function's result for
    each, in the order of the blocks."""
    shared = ray.put(function)  # once, not with each of the tasks
    calls = ((shared, number, block) for number, block in enumerate(blocks))
    found: dict[int, BlockValues] = {}
    num_cpus = config.num_workers * config.cpus_per_worker
    options = {"num_cpus": 1, "max_retries": config.max_failures}
    with Progress("evaluate: resampling", len(blocks), "blocks") as progress:
        for ended in spread(_compute, calls, lambda: num_cpus, **options):
            found |= dict(ended)
            progress.advance_to(len(found))
    return (found[number] for number in sorted(found))


def _compute(
    function: Callable[[ResampleBlock], BlockValues], number: int, block: ResampleBlock
) -> tuple[int, BlockValues]:
    with threadpool_limits(1):
        return number, function(block)
