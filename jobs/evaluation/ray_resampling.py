"""Resamples of an evaluation, spread over the cluster's workers."""

from collections.abc import Callable, Iterable, Iterator

import ray
from threadpoolctl import threadpool_limits

from jobs.ray_cluster.spreading import spread
from pneumo.config import ClusterConfig
from pneumo.evaluation.bootstrap import Block, Columns, Share, in_turn

_FEW = 20_000
"""Predictions below which it takes longer to send the work than to do it."""


def share_resamples(config: ClusterConfig, num_predictions: int) -> Share:
    """What computes blocks of resamples on as many CPUs as the workers have; of few predictions in
    this process. The results are the same."""
    return in_turn if num_predictions < _FEW else Spreading(config)


class Spreading:
    """A `Share` over Ray's workers, one block a task and a CPU."""

    def __init__(self, config: ClusterConfig) -> None:
        self._num_cpus = config.num_workers * config.cpus_per_worker
        self._max_retries = config.max_failures

    def __call__(
        self, function: Callable[[Block], Columns], blocks: Iterable[Block]
    ) -> Iterator[Columns]:
        """The function of each block, in their order."""
        shared = ray.put(function)  # once, not with each of the tasks
        calls = ((shared, number, block) for number, block in enumerate(blocks))
        found: dict[int, Columns] = {}
        options = {"num_cpus": 1, "max_retries": self._max_retries}
        for ended in spread(_compute, calls, lambda: self._num_cpus, **options):
            found |= dict(ended)
        return (found[number] for number in sorted(found))


def _compute(
    function: Callable[[Block], Columns], number: int, block: Block
) -> tuple[int, Columns]:
    with threadpool_limits(1):
        return number, function(block)
