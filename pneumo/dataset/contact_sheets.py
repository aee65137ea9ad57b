"""Contact sheets: random images of the training split for each finding, for visual checks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from pneumo.dataset.manifest import Manifest
from pneumo.dataset.quality import UNKNOWN, order_values
from pneumo.dataset.shards import Sample, read_blocks
from pneumo.dataset.source import Finding
from pneumo.dataset.study_table import StudyRow
from pneumo.errors import DataError

_MAX_BLOCKS = 16
"""Limit of blocks to read for the contact sheets: 52 MB at 224 px."""


@dataclass(frozen=True, eq=False)
class ContactSheet:
    """Random images of train with one finding."""

    finding: str
    studies: int
    """Number of studies of train with the finding."""
    pictures: tuple[npt.NDArray[np.uint8], ...]
    """(S, S) uint8 each, 0 = black."""
    views: tuple[str, ...]
    """View of each image: 'AP', 'PA' or 'unknown'."""

    @property
    def caption(self) -> str:
        """`Normal: 12 of 4,321 studies of train, 5 AP, 7 PA`; without keys of studies."""
        views = (
            f"{n} of unknown view" if view == UNKNOWN else f"{n} {view}"
            for view, n in sorted(Counter(self.views).items())
        )
        start = f"{self.finding}: {len(self.pictures)} of {self.studies:,} studies of train"
        return ", ".join([start, *views])


def read_contact_sheets(
    store_url: str, manifest: Manifest, studies: Mapping[str, StudyRow], *, per_finding: int = 12
) -> tuple[ContactSheet, ...]:
    """Contact sheets of train; `studies` are the store's rows by key.

    The studies of a shard are in random order, so its first ones are a random sample: usually one
    block is read, and at most `_MAX_BLOCKS`. A rare finding may have fewer images. Raises DataError
    when a shard is missing or not what the manifest says.
    """
    blocks = [(entry, block) for entry in manifest.splits["train"].shards for block in entry.blocks]
    samples = read_blocks(store_url, blocks[:_MAX_BLOCKS], manifest.image_size)
    return fill_contact_sheets(samples, studies, per_finding=per_finding)


def fill_contact_sheets(
    samples: Iterable[Sample], studies: Mapping[str, StudyRow], *, per_finding: int = 12
) -> tuple[ContactSheet, ...]:
    """Contact sheets with the first `per_finding` of `samples` with each finding of train; stops
    when they are full. Raises DataError for a sample that is not in `studies`."""
    totals = Counter(row.finding for row in studies.values() if row.split == "train")
    order = order_values(set(totals), [finding for finding in get_args(Finding) if totals[finding]])
    chosen: dict[str, list[tuple[Sample, StudyRow]]] = {finding: [] for finding in order}
    wanted = sum(min(per_finding, number) for number in totals.values())
    for sample in samples:
        row = studies.get(sample.key)
        if row is None or row.split != "train":
            raise DataError(
                "studies.parquet: a study in a shard of train is not in it; delete the store and "
                "prepare it again"
            )
        if len(chosen[row.finding]) < per_finding:
            chosen[row.finding].append((sample, row))
        if sum(map(len, chosen.values())) >= wanted:
            break
    return tuple(
        ContactSheet(
            finding=finding,
            studies=totals[finding],
            pictures=tuple(sample.pixels for sample, _ in pairs),
            views=tuple(row.view or UNKNOWN for _, row in pairs),
        )
        for finding, pairs in chosen.items()
    )
