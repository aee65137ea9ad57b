"""What all layouts use: the source's folder with its secret, and a collector of studies."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

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
    """A source's folder, and the settings for reading it."""

    source_url: str
    """The user's URL; the secret is beside it."""
    url: str
    """The folder with the tables: the same, or a folder in it."""
    files: Mapping[str, str]
    """Name -> URL of the files and folders in `url` and `source_url`."""
    environ: Mapping[str, str]
    settings: PrepareConfig
    named_split: str | None

    @cached_property
    def hash_key(self) -> bytes:
        """The secret. Raises SourceError."""
        return read_hash_key(self.source_url, self.environ)


@dataclass(frozen=True)
class Layout:
    """The folder layout of a data set."""

    name: str
    """Value of prepare.layout."""
    title: str
    name_patterns: tuple[str, ...]
    """Regular expressions of typical names: where no layout is recognised, the error names the
    layout with the most matches."""
    missing: str
    """What an unrecognised folder lacks, for the error."""
    recognise: Callable[[Mapping[str, str]], bool]
    """Whether a folder with these names -> URLs has the layout."""
    read: Callable[[Folder, "Layout"], Source]
    """Raises SourceError."""
    settings: frozenset[str] = frozenset()
    """Settings of `prepare` that only some layouts use, and this one does."""


class StudyCollector:
    """Collects the studies of a folder, in any order."""

    def __init__(self, folder: Folder, layout: Layout) -> None:
        self._folder, self._layout = folder, layout
        self._studies: list[Study] = []
        self._rejected: list[Rejected] = []
        derive = partial(derive_key, folder.hash_key, "patient")
        self._derive_patient = lru_cache(maxsize=None)(derive)
        self._assign = lru_cache(maxsize=None)(partial(assign_patient, folder.named_split or ""))

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
        """Add a study; `patient` is None where it is unknown. Raises SourceError."""
        if self._folder.named_split is not None:
            published = self._assign(patient)
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
        """Add an image that cannot be used."""
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
        """The source with all studies. Raises SourceError where two have the same key."""
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


def positive_labels(folder: Folder) -> tuple[str, ...]:
    """The labels that count as positive."""
    return tuple(folder.settings.positive) or ("Pneumonia",)
