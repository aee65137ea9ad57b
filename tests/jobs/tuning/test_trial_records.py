"""Names of trials come from listings; none becomes a path outside the search's folder."""

from collections.abc import Iterator

import fsspec
import pytest

from jobs.tuning.search_wandb import read_search
from jobs.tuning.trial_records import (
    drop_checkpoints,
    list_ended,
    read_trials,
    trial_url,
    write_begun,
    write_ended,
)
from pneumo.config import Config
from pneumo.errors import ContentError

RUN = "memory://search-of-listings"


@pytest.fixture
def run_url() -> Iterator[str]:
    """A search with one trial, and beside it keys that lead elsewhere, as an object store takes
    them."""
    memory = fsspec.filesystem("memory")
    write_begun(RUN, "t001", {"train.lr": 0.1}, 0)
    write_ended(RUN, "t001", "finished", None)
    memory.pipe(f"{RUN}/config.json", Config().to_json().encode())
    for name in ("..", "../..", "../../up", "t001/../../up", "t001/deeper"):
        for file in ("trial.json", "end.json"):
            memory.pipe(f"{RUN}/trials/{name}/{file}", b"{}")
    yield RUN
    memory.rm("/search-of-listings", recursive=True)


def test_only_folders_of_the_search_are_trials(run_url: str) -> None:
    assert list(read_trials(run_url)) == ["t001"]
    assert list_ended(run_url) == ["t001"]
    (told,) = read_search(run_url)  # what W&B is told
    assert told.name.endswith("-t001")


@pytest.mark.parametrize("name", ["..", "../../up", "t001/../../up"])
def test_a_name_that_leads_out_is_refused(run_url: str, name: str) -> None:
    with pytest.raises(ContentError, match="refused a name below it"):
        write_ended(run_url, name, "finished", None)
    with pytest.raises(ContentError, match="refused a name below it"):
        drop_checkpoints(trial_url(run_url, name))


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ("the loss is nan", "the loss is nan"),
        (
            "cannot read /a/b/3-f9.tar: Input/output error",
            "cannot read 3-f9.tar: Input/output error",
        ),
        ("/home/a b/my store/3.tar: is gone", "3.tar: is gone"),
        ("No such file: '/home/alice/w.pt'", "No such file: 'w.pt'"),
        ("s3://ward/store/3.tar: no right", "3.tar: no right"),
        ("http://10.0.0.1:9000/ward/3.tar is gone", "3.tar is gone"),
        ("on node (IP: 10.0.0.1, ID: 5f)", "on node (IP: (address), ID: 5f)"),
    ],
)
def test_an_error_is_sent_without_folders_and_servers(run_url: str, said: str, sent: str) -> None:
    write_ended(run_url, "t001", "failed", said)
    assert read_trials(run_url)["t001"].error == sent  # in the table and on the page too
    (told,) = read_search(run_url)
    assert told.summary["tune/error"] == sent
