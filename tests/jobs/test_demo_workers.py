"""How many workers the demo trains with."""

import pytest

from jobs.demo import count_workers


@pytest.mark.parametrize(
    ("resources", "workers"),
    [({"CPU": 2}, 2), ({"CPU": 64}, 2), ({"GPU": 0}, 2), ({"GPU": 1}, 1), ({"GPU": 8}, 2)],
)
def test_it_asks_for_no_more_gpus_than_there_are(resources: dict[str, float], workers: int) -> None:
    assert count_workers(resources) == workers
