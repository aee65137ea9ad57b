"""What every layout works with: a folder with its secret, and the studies under their keys."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import PurePosixPath

from pneumo.config import PrepareConfig
from pneumo.dataset.named_splits import assign_patient
from pneumo.dataset.source import Rejected, Source, Study
from pneumo.dataset.study_keys import (
    derive_file_key,
    derive_key,
    derive_secret_check,
    read_hash_key,
)
from pneumo.errors import SourceError
from pneumo.images.boxes import Box
from pneumo.images.headers import Header


@dataclass(frozen=True)
class Folder:
    """A source's folder, and how it is to be read."""

    source_url: str
    """As it was given; the secret lies beside it."""
    url: str
    """Where the tables are: the same, or the one folder in it."""
    files: Mapping[str, str]
    """Name -> URL of what lies there."""
    environ: Mapping[str, str]
    settings: PrepareConfig
    named_split: str | None

    @cached_property
    def hash_key(self) -> bytes:
        """The secret. Raises SourceError."""
        return read_hash_key(self.source_url, self.environ)


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set."""

    name: str
    """Value of prepare.layout."""
    title: str
    traces: tuple[str, ...]
    """Patterns of names by which the nearest layout is found, where none is whole."""
    lacking: str
    """What to say of a folder that has traces, but is not recognised."""
    recognise: Callable[[Mapping[str, str]], bool]
    """Whether a folder of these names and URLs has the layout."""
    read: Callable[[Folder, "Layout"], Source]
    """Raises SourceError."""
    settings: frozenset[str] = frozenset()
    """Settings of `prepare` that have an effect on this layout alone."""


class StudyCollector:
    """The studies of a folder, in whatever order they are found."""

    def __init__(self, folder: Folder, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._studies: list[Study] = []
        self._rejected: list[Rejected] = []
        derive = partial(derive_key, folder.hash_key, "patient")
        self._derive_patient = lru_cache(maxsize=None)(derive)
        self._place = lru_cache(maxsize=None)(partial(assign_patient, folder.named_split or ""))

    def add(
        self,
        image_id: str,
        patient: str | None,
        url: str,
        target: int,
        finding: str,
        *,
        boxes: Iterable[Box] = (),
        header: Header | None = None,
        published: str | None = None,
    ) -> None:
        """One study; `patient` is None where nobody knows who it is of. Raises SourceError."""
        if self._folder.named_split is not None:
            published = self._place(patient)
        self._studies.append(
            Study(
                key=derive_key(self._folder.hash_key, "study", image_id),
                patient=self._derive_patient(image_id if patient is None else patient),
                url=url,
                target=target,
                finding=finding,
                boxes=tuple(boxes),
                layout=self._layout.name,
                header=header,
                published=published,
            )
        )

    def reject(self, image_id: str, reason: str, message: str) -> None:
        """An image that cannot be used."""
        key = derive_key(self._folder.hash_key, "study", image_id)
        self._rejected.append(Rejected(key, None, reason, message))

    def finish(
        self,
        *,
        has_patients: bool = True,
        unlabelled: int = 0,
        left_out: Mapping[str, int] | None = None,
        notes: tuple[str, ...] = (),
    ) -> Source:
        """All of them. Raises SourceError where two have one key."""
        if len({study.key for study in self._studies}) != len(self._studies):
            raise SourceError(
                f"{self._folder.source_url}: two image ids have one hash; set another hash key"
            )
        return Source(
            studies=tuple(sorted(self._studies, key=lambda study: study.key)),
            rejected=tuple(sorted(self._rejected, key=lambda item: item.key)),
            has_patients=has_patients,
            unlabelled=unlabelled,
            file_key=derive_file_key(self._folder.hash_key),
            secret_check=derive_secret_check(self._folder.hash_key),
            layout=self._layout.name,
            title=self._layout.title,
            left_out=left_out or {},
            notes=notes,
        )


def find_positive(folder: Folder) -> tuple[str, ...]:
    """The labels that count as positive."""
    return tuple(folder.settings.positive) or ("Pneumonia",)


def stem(name: str) -> str:
    """A file's name without its ending."""
    return PurePosixPath(name).stem
