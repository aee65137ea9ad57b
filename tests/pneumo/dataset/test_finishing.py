"""Two jobs finish one store: whatever one does between two steps of the other, it stays whole."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pneumo import storage
from pneumo.dataset.manifest import Manifest, read_manifest
from pneumo.dataset.preparation import TABLES_CLAIM, find_store
from pneumo.dataset.shard_tasks import ShardRecord
from pneumo.dataset.source import Rejected
from pneumo.dataset.study_table import StudyWarning, read_quarantine, read_studies, read_warnings
from pneumo.errors import BadFilesError, StoreError
from tests.pneumo.dataset.test_preparation import CONFIG, FolderMaker, Preparation


class Killed(BaseException):
    """No error that a job could handle."""


class Turns(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory; something else happens before one of the requests."""

    protocol = "turns"
    left: ClassVar[list[Callable[[], object] | None]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("turns://")))

    @classmethod
    def before(cls, request: int, do: Callable[[], object]) -> None:
        """Do it before that request, counted from 0."""
        cls.left[:] = [do, *[None] * request]

    def _next(self) -> None:
        if self.left and (do := self.left.pop()):
            do()

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._next()
        super().pipe_file(path, value, mode=mode, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        self._next()
        data: bytes = super().cat_file(path, **kwargs)
        return data

    def rm_file(self, path: str) -> None:
        self._next()
        super().rm_file(path)


fsspec.register_implementation("turns", Turns)

Job = Callable[[], Manifest | str]


class Race:
    """A store before its end, and jobs that would finish it, each with its own records."""

    def __init__(self, folder: Path, store: str) -> None:
        self.preparation, self.store = Preparation(folder), store
        assert find_store(store, self.preparation.source, CONFIG) is None
        for plan in self.preparation.plans:
            self.preparation.do(plan, store)
        self.records = dict(self.preparation.parts)
        self.objects = {url: storage.read_bytes(url) for url in storage.list_urls(store)}

    def start_again(self) -> None:
        storage.remove_below(self.store)
        for url, data in self.objects.items():
            storage.write_bytes(url, data)

    def job(self, **changes: Any) -> Job:
        """A job whose first record has these changes."""
        name, record = next(iter(self.records.items()))
        parts: dict[str, ShardRecord] = {**self.records, name: record.model_copy(update=changes)}

        def finish() -> Manifest | str:
            self.preparation.parts = parts
            try:
                return self.preparation.finish(self.store)
            except (StoreError, BadFilesError) as error:
                return str(error)

        return finish

    def check(self, results: Iterable[Manifest | str]) -> None:
        """The store is whole and is that of all who finished it."""
        manifest = read_manifest(self.store)
        assert len(read_studies(self.store, manifest)) == 120
        read_quarantine(self.store, manifest)
        read_warnings(self.store, manifest)
        finished = [result for result in results if isinstance(result, Manifest)]
        assert finished
        assert all(result == manifest for result in finished)


@pytest.fixture
def race(kaggle_folder: FolderMaker, tmp_path: Path) -> Race:
    Turns.left.clear()
    return Race(kaggle_folder(num_studies=120), f"turns://{tmp_path}")


def other_job(race: Race) -> Job:
    """It could not read a file, and warns of another."""
    key = next(iter(race.records.values())).rows[0].key
    rejected = Rejected("0" * 16, "train", "missing", "no such file")
    return race.job(rejected=(rejected,), warned=(StudyWarning(key, "train", "parsed:x"),))


@pytest.mark.parametrize("records", ["other", "same"])
def test_a_job_that_ends_within_another_destroys_nothing(race: Race, records: str) -> None:
    first = race.job()
    second = other_job(race) if records == "other" else race.job()
    for request in range(100):
        race.start_again()
        results: list[Manifest | str] = []
        Turns.before(request, lambda: results.append(second()))  # noqa: B023  called in this turn
        results.append(first())
        if Turns.left:
            break
        race.check(results)
        if records == "same":
            assert not any(isinstance(result, str) for result in results)
        assert not storage.exists(f"{race.store}/parts")
    assert 10 < request < 99


def test_a_job_that_is_killed_is_repeated_or_told_from_another(race: Race) -> None:
    first, second = race.job(), other_job(race)

    def die() -> None:
        raise Killed

    refused = 0
    for request in range(100):
        race.start_again()
        Turns.before(request, die)
        try:
            first()
        except Killed:
            pass
        else:
            break
        results = [second()]
        if isinstance(results[0], str):
            refused += 1
            assert "another preparation, which could read other files" in results[0]
            assert f"delete {race.store}/{TABLES_CLAIM} and repeat" in results[0]
            if refused % 2:
                storage.remove(f"{race.store}/{TABLES_CLAIM}")
                results.append(second())
        race.check([*results, first()])
    assert 3 <= refused < request < 99


def test_a_job_with_too_many_bad_files_leaves_the_tables_alone(race: Race) -> None:
    rejected = [Rejected(f"{i:016}", "train", "missing", "no such file") for i in range(9)]
    bad, first = race.job(rejected=tuple(rejected)), race.job()

    for request in range(100):
        race.start_again()
        results: list[Manifest | str] = []
        Turns.before(request, lambda: results.append(first()))  # noqa: B023  called in this turn
        told = bad()
        if isinstance(told, str):
            assert f"see {race.store}/parts/quarantine.jsonl, repair" in told
        if Turns.left:
            break
        race.check([*results, first()])
    assert request > 1
    race.check([first()])
