"""What the demo is told, and with how many workers it trains."""

import pytest

from jobs.demo import count_workers, main


@pytest.mark.parametrize("flags", [["--studies", "0"], ["--studies", "x"], ["--sudies", "9"]])
def test_a_wrong_flag_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert flags[0] in line
    assert "see python -m jobs.demo --help" in line


@pytest.mark.parametrize(
    ("resources", "workers"),
    [({"CPU": 2}, 2), ({"CPU": 64}, 2), ({"GPU": 0}, 2), ({"GPU": 1}, 1), ({"GPU": 8}, 2)],
)
def test_it_asks_for_no_more_gpus_than_there_are(resources: dict[str, float], workers: int) -> None:
    assert count_workers(resources) == workers
