"""What is counted is what is there, what is unknown is said, and no more is read than is shown."""

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from pneumo.config import SplitConfig
from pneumo.dataset.contact_sheets import fill_contact_sheets, read_contact_sheets
from pneumo.dataset.manifest import Duplicates, FileEntry, Manifest, SplitEntry, read_manifest
from pneumo.dataset.quality import (
    AGE_BANDS,
    UNKNOWN,
    Intensity,
    Quality,
    find_shifts,
    group_warnings,
    name_age_band,
    standardise_difference,
    summarise_quality,
)
from pneumo.dataset.shards import Sample
from pneumo.dataset.splits import SPLITS, Interval, LeakageAudit
from pneumo.dataset.study_table import StudyRow, StudyWarning, read_studies
from pneumo.errors import DataError

FINDINGS = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")


def row(number: int = 0, **changes: object) -> StudyRow:
    study = StudyRow(
        key=f"{number:020x}",
        patient=f"p{number}",
        split="train",
        target=0,
        finding="Normal",
        boxes=(),
        age=50,
        sex="F",
        view="PA",
        spacing_mm=0.143,
        pixels_digest=f"{number:032x}",
        source_blake3=f"{number:064x}",
    )
    return dataclasses.replace(study, **changes)  # type: ignore[arg-type]


def manifest_of(rows: Sequence[StudyRow], **changes: object) -> Manifest:
    splits = {
        name: SplitEntry(
            samples=sum(study.split == name for study in rows),
            positives=sum(study.target for study in rows if study.split == name),
            patients=len({study.patient for study in rows if study.split == name}),
            histogram=tuple(range(256)),
            shards=(),
        )
        for name in SPLITS
    }
    audit = LeakageAudit(
        unit="patient",
        salt=0,
        list_digest=None,
        unlisted=0,
        studies={name: entry.samples for name, entry in splits.items()},
        positives={name: entry.positives for name, entry in splits.items()},
        patients={name: entry.patients for name, entry in splits.items()},
        prevalence=dict.fromkeys(SPLITS, Interval(value=0.5, low=0.0, high=1.0)),
        shard_prevalence=dict.fromkeys(SPLITS, (0.0, 1.0)),
        shared_patients=0,
        leaked_by_image=None,
    )
    manifest = Manifest(
        source_digest="0" * 64,
        prepare_digest="1" * 64,
        image_size=8,
        seed=0,
        split=SplitConfig(),
        audit=audit,
        mean=0.5,
        std=0.2,
        quarantined={"missing": 2},
        contradictions={"sex": 1},
        unlabelled=0,
        duplicates=Duplicates(pictures=0, studies=0, across_patients=0, across_splits=0),
        studies=FileEntry(bytes=0, sha256="0" * 64),
        quarantine=FileEntry(bytes=0, sha256="0" * 64),
        splits=splits,
    )
    return manifest.model_copy(update=changes)


@st.composite
def stores(draw: st.DrawFn) -> list[StudyRow]:
    studies = draw(
        st.lists(
            st.tuples(
                st.sampled_from(SPLITS),
                st.sampled_from(FINDINGS),
                st.none() | st.integers(0, 120),
                st.sampled_from([None, "F", "M"]),
                st.sampled_from([None, "AP", "PA", "LL"]),
                st.sampled_from([None, *(0.1 + i / 100 for i in range(12))]),
                st.integers(0, 9),
            ),
            max_size=40,
        )
    )
    return [
        row(
            i,
            split=split,
            target=int(finding == "Lung Opacity"),
            finding=finding,
            age=age,
            sex=sex,
            view=view,
            spacing_mm=spacing,
            patient=f"{split}{patient}",
        )
        for i, (split, finding, age, sex, view, spacing, patient) in enumerate(studies)
    ]


def summarise(rows: Sequence[StudyRow]) -> Quality:
    return summarise_quality(rows, manifest_of(rows))


# --- counts --------------------------------------------------------------------------------------


@given(stores())
def test_counts_are_those_of_the_rows(rows: list[StudyRow]) -> None:
    quality = summarise(rows)
    for name, split in quality.splits.items():
        mine = [study for study in rows if study.split == name]
        assert split.studies == len(mine)
        assert split.patients == len({study.patient for study in mine})
        assert split.positives == sum(study.target for study in mine)
        for what in ("finding", "view", "sex"):
            for value, number in split.counts[what].items():
                assert number == sum((getattr(study, what) or UNKNOWN) == value for study in mine)
        ages = [study.age for study in mine if study.age is not None]
        assert split.counts["age"][UNKNOWN] == len(mine) - len(ages)
        assert split.counts["age"]["40–59"] == sum(40 <= age < 60 for age in ages)
        assert sum(split.ages) == len(ages)
        assert split.ages[3] == sum(30 <= age < 40 for age in ages)
        assert split.age_median == (statistics.median(ages) if ages else None)


@given(stores())
def test_every_study_is_in_one_value_of_everything_and_splits_line_up(
    rows: list[StudyRow],
) -> None:
    quality = summarise(rows)
    for split in quality.splits.values():
        assert all(sum(counts.values()) == split.studies for counts in split.counts.values())
        for what, counts in split.counts.items():
            assert list(counts) == list(quality.splits["train"].counts[what])
            if what not in ("label", "finding"):
                assert list(counts)[-1] == UNKNOWN
    columns = list(zip(*quality.rows(), strict=True))
    for column, name in zip(columns[2:], SPLITS, strict=True):
        assert sum(column) == 6 * quality.splits[name].studies


@given(stores())
def test_order_of_the_rows_does_not_matter(rows: list[StudyRow]) -> None:
    assert summarise(rows) == summarise(rows[::-1])


def test_what_nobody_expects_is_counted_before_unknown() -> None:
    counts = summarise([row(0, view="LL", finding="Nodule"), row(1, view=None)]).splits["train"]
    assert counts.counts["view"] == {"AP": 0, "PA": 0, "LL": 1, "unknown": 1}
    assert counts.counts["finding"] == {**dict.fromkeys(FINDINGS, 0), "Normal": 1, "Nodule": 1}


@pytest.mark.parametrize(
    ("age", "band"),
    [
        (0, "under 18"),
        (17, "under 18"),
        (18, "18–39"),
        (39, "18–39"),
        (40, "40–59"),
        (60, "60–79"),
        (79, "60–79"),
        (80, "80 and over"),
        (120, "80 and over"),
        (None, UNKNOWN),
    ],
)
def test_age_bands(age: int | None, band: str) -> None:
    assert name_age_band(age) == band
    assert band in {*AGE_BANDS, UNKNOWN}


def test_few_spacings_are_listed_and_many_are_not() -> None:
    few = summarise(
        [row(0, spacing_mm=0.194311), row(1, spacing_mm=0.143), row(2, spacing_mm=None)]
    )
    assert few.splits["train"].counts["spacing"] == {"0.143 mm": 1, "0.194 mm": 1, "unknown": 1}

    many = [row(i, spacing_mm=0.1 + i / 100) for i in range(20)] + [row(20, spacing_mm=None)]
    train = summarise(many).splits["train"]
    assert train.counts["spacing"] == {"known": 20, "unknown": 1}
    assert train.spacing_quartiles == pytest.approx((0.1475, 0.195, 0.2425))


def test_a_split_of_nothing_but_unknowns() -> None:
    nothing = row(0, age=None, sex=None, view=None, spacing_mm=None)
    split = summarise([nothing]).splits["train"]
    assert split.age_median is None
    assert split.spacing_quartiles is None
    assert all(split.counts[what][UNKNOWN] == 1 for what in ("age", "sex", "view", "spacing"))


@given(st.lists(st.integers(0, 255), max_size=50))
def test_intensity_is_that_of_the_pixels(pixels: list[int]) -> None:
    found = Intensity(tuple(np.bincount(np.array(pixels, int), minlength=256).tolist()))
    if not pixels:
        assert (found.mean, found.black, found.white) == (None, None, None)
        return
    assert found.mean == pytest.approx(statistics.mean(pixels) / 255)
    assert found.black == pixels.count(0) / len(pixels)
    assert found.white == pixels.count(255) / len(pixels)


def test_what_the_manifest_knows_is_taken_from_it() -> None:
    duplicates = Duplicates(pictures=2, studies=5, across_patients=1, across_splits=1)
    rows = [row(0)]
    quality = summarise_quality(rows, manifest_of(rows, duplicates=duplicates))
    assert quality.duplicates == duplicates
    assert quality.quarantined == {"missing": 2}
    assert quality.contradictions == {"sex": 1}
    assert quality.splits["val"].intensity.histogram == tuple(range(256))


def test_studies_of_another_number_than_the_manifest_are_refused() -> None:
    rows = [row(0), row(1)]
    with pytest.raises(DataError, match="1 studies of train, the manifest says 2"):
        summarise_quality(rows[:1], manifest_of(rows))


# --- shifts --------------------------------------------------------------------------------------


def population(split: str, number: int, ap: float, age: int, **changes: object) -> list[StudyRow]:
    return [
        row(
            i,
            split=split,
            patient=f"{split}{i}",
            view="AP" if i < ap * number else "PA",
            age=age + i % 10,
            **changes,
        )
        for i in range(number)
    ]


def shifts_of(*parts: list[StudyRow]) -> dict[tuple[str, str], float]:
    by_split = dict(zip(SPLITS, parts, strict=True))
    return {(shift.what, shift.split): shift.difference for shift in find_shifts(by_split)}


def test_equal_splits_differ_in_nothing() -> None:
    parts = [population(name, 200, 0.4, 50) for name in SPLITS]
    assert shifts_of(*parts) == {}


def test_a_shift_has_the_numbers_of_a_straightforward_computation() -> None:
    train, val = population("train", 400, 0.4, 50), population("val", 200, 0.4, 50)
    test = population("test", 200, 0.6, 53)
    by_split = {"train": train, "val": val, "test": test}
    age, view = find_shifts(by_split)  # the largest first
    assert (age.what, age.split) == ("Mean age", "test")
    assert (age.in_train, age.in_split) == (54.5, 57.5)
    assert age.difference == pytest.approx(3 / statistics.pstdev(range(10)))
    assert not age.is_by_chance
    assert (view.what, view.unit) == ("AP among known views", "%")
    assert view.difference == pytest.approx(0.2 / math.sqrt(0.6 * 0.4))
    quantile = t.ppf(1 - 0.025 / 20, 198)  # ten properties, two splits
    assert view.by_chance == pytest.approx(quantile * math.sqrt(1 / 399 + 1 / 199))
    assert str(view) == (
        "AP among known views: 40.0\N{NO-BREAK SPACE}% in train, 60.0\N{NO-BREAK SPACE}% in test "
        "(standardised difference +0.41, chance explains ±0.27)"
    )


def test_images_of_few_patients_are_little_evidence() -> None:
    train, test = population("train", 200, 0.4, 50), population("test", 200, 0.6, 50)
    few = [dataclasses.replace(study, patient=f"q{i // 40}") for i, study in enumerate(test)]
    (shift,) = find_shifts({"train": train, "val": [], "test": test})
    (doubtful,) = find_shifts({"train": train, "val": [], "test": few})
    assert shift.difference == doubtful.difference
    assert doubtful.is_by_chance
    assert not shift.is_by_chance


def test_chance_explains_as_much_as_patients_who_change_places_do() -> None:
    """Most patients have one study, some have many, which are alike: 400 random splits of them."""
    draws = random.Random(5)
    patients = []
    for number in range(600):
        view = draws.choice(["AP", "PA"])
        size = 30 if number % 20 == 0 else 1
        patients.append(
            [row(1000 * number + i, patient=f"p{number}", view=view) for i in range(size)]
        )
    beyond = 0
    for _ in range(400):
        draws.shuffle(patients)
        parts = [list(chain(*some)) for some in (patients[:400], patients[400:])]
        train, test = parts
        shifts = find_shifts({"train": train, "val": [], "test": test}, notable=0.0)
        views = [shift for shift in shifts if shift.what == "AP among known views"]
        beyond += any(not shift.is_by_chance for shift in views)
    assert 0.01 < beyond / 400 < 0.10  # of 0.05; by the number of patients it is a third


def test_what_is_unknown_in_one_split_alone_is_a_shift_and_never_a_value() -> None:
    train, val = population("train", 100, 0.4, 50), population("val", 100, 0.4, 50)
    test = population("test", 100, 0.4, 50, sex=None, spacing_mm=None)
    assert shifts_of(train, val, test) == {
        ("Unknown sexes", "test"): math.inf,
        ("Unknown spacings", "test"): math.inf,
    }
    (shift, _) = find_shifts({"train": train, "val": val, "test": test})
    assert "0.0\N{NO-BREAK SPACE}% in train, 100.0\N{NO-BREAK SPACE}% in test" in str(shift)
    assert "no spread at all" in str(shift)


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(0.01, 50), st.floats(0.01, 50))
def test_standardised_difference_is_antisymmetric_and_of_no_unit(
    first: float, second: float, one: float, other: float
) -> None:
    difference = standardise_difference(first, second, one, other)
    assert standardise_difference(second, first, other, one) == -difference
    scaled = standardise_difference(3 * first, 3 * second, 9 * one, 9 * other)
    assert scaled == pytest.approx(difference, abs=1e-6)
    assert standardise_difference(first, first, one, other) == 0


# --- contact sheets ------------------------------------------------------------------------------


def samples_of(rows: Sequence[StudyRow], taken: list[str]) -> Iterator[Sample]:
    """A sample a row; what is taken of them is written down."""
    for i, study in enumerate(rows):
        taken.append(study.key)
        yield Sample(study.key, np.full((8, 8), i % 256, np.uint8), study.target)


@given(st.lists(st.sampled_from(FINDINGS), min_size=1, max_size=60), st.integers(1, 6))
def test_contact_holds_the_first_of_each_finding_and_takes_no_more(
    findings: list[str], per_finding: int
) -> None:
    rows = [row(i, finding=finding) for i, finding in enumerate(findings)]
    taken: list[str] = []
    sheets = fill_contact_sheets(
        samples_of(rows, taken), {study.key: study for study in rows}, per_finding=per_finding
    )
    assert {sheet.finding for sheet in sheets} == set(findings)
    last = 0
    for sheet in sheets:
        places = [i for i, finding in enumerate(findings) if finding == sheet.finding]
        assert [int(pixels[0, 0]) for pixels in sheet.pictures] == places[:per_finding]
        assert sheet.studies == len(places)
        last = max(last, *places[:per_finding])
    assert len(taken) == last + 1


def test_contact_captions_name_no_study() -> None:
    rows = [row(i, view=view) for i, view in enumerate(("AP", "PA", None, "AP"))]
    (sheet,) = fill_contact_sheets(samples_of(rows, []), {study.key: study for study in rows})
    assert sheet.caption == "Normal: 4 of 4 studies of train, 2 AP, 1 PA, 1 of unknown view"
    assert not any(study.key in sheet.caption or study.patient in sheet.caption for study in rows)


def test_a_sample_that_the_studies_do_not_know_is_refused() -> None:
    rows = [row(0), row(1)]
    with pytest.raises(DataError, match="not in it"):
        fill_contact_sheets(samples_of(rows, []), {rows[1].key: rows[1]})


def test_only_the_shards_that_are_needed_are_read(tiny_store: Callable[..., str]) -> None:
    store_url = tiny_store(train=80, samples_per_shard=16)
    manifest = read_manifest(store_url)
    studies = read_studies(store_url, manifest)
    for entry in manifest.splits["train"].shards[1:]:
        Path(store_url, entry.name).unlink()
    sheets = read_contact_sheets(store_url, manifest, studies, per_finding=5)
    assert [len(sheet.pictures) for sheet in sheets] == [5, 5, 5]
    assert {pixels.shape for sheet in sheets for pixels in sheet.pictures} == {(32, 32)}
    with pytest.raises(DataError, match="missing from"):
        read_contact_sheets(store_url, manifest, studies, per_finding=6)


def test_a_rare_finding_never_costs_the_whole_split(tiny_store: Callable[..., str]) -> None:
    store_url = tiny_store(train=80, samples_per_shard=4)  # a shard of four is one block
    manifest = read_manifest(store_url)
    studies = read_studies(store_url, manifest)
    for entry in manifest.splits["train"].shards[16:]:
        Path(store_url, entry.name).unlink()
    sheets = read_contact_sheets(store_url, manifest, studies, per_finding=1_000)
    assert sum(len(sheet.pictures) for sheet in sheets) == 64
    assert sum(sheet.studies for sheet in sheets) == 80


def test_warnings_are_grouped_by_code_and_split() -> None:
    warned = [
        StudyWarning("b", "test", "doubtful:turned"),
        StudyWarning("a", "test", "doubtful:turned"),
        StudyWarning("a", "train", "left_out:WindowWidth"),
    ]
    assert group_warnings(warned) == {
        "doubtful:turned": {"train": (), "val": (), "test": ("a", "b")},
        "left_out:WindowWidth": {"train": ("a",), "val": (), "test": ()},
    }
