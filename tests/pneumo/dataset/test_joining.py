"""Stores are joined without a patient or picture of val or test in train, and without any twice."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumo.dataset.joining import check_stores, join_stores
from pneumo.dataset.manifest import Manifest, read_manifest, write_manifest
from pneumo.dataset.overlap import have_one_secret
from pneumo.dataset.shards import read_shard
from pneumo.dataset.splits import SPLITS
from pneumo.dataset.study_table import StudyRow, read_studies, tabulate_studies, write_studies
from pneumo.errors import StoreError


def change(store_url: str, keys: dict[str, dict[str, Any]], **manifest_fields: Any) -> None:
    """Change columns of studies of a store and fields of its manifest, as if it had been prepared
    so."""
    manifest = read_manifest(store_url)
    rows = read_studies(store_url, manifest)
    rows |= {key: replace(rows[key], **columns) for key, columns in keys.items()}
    entry = write_studies(store_url, tabulate_studies(rows.values()))
    (Path(store_url) / "manifest.json").unlink()
    manifest = manifest.model_copy(update={"studies": entry, **manifest_fields})
    write_manifest(store_url, manifest)


def of_split(rows: dict[str, StudyRow], split: str) -> list[StudyRow]:
    return [row for row in rows.values() if row.split == split]


def read(url: str) -> dict[str, StudyRow]:
    return read_studies(url, read_manifest(url))


def make_two(tiny_store: Any, folder: Path) -> list[str]:
    """Two stores of other patients and pictures, under one secret."""
    urls = []
    for name, seed in (("a", 1), ("b", 2)):
        url = str(Path(tiny_store(seed=seed)).rename(folder / name))
        (folder / name / "secret_check.txt").write_text("1\n")
        change(url, {k: {"patient": f"{name} {row.patient}"} for k, row in read(url).items()})
        urls.append(url)
    return urls


def join(
    urls: list[str],
    folder: Path,
    *,
    balanced: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Manifest, dict[str, StudyRow]]:
    manifest = join_stores(urls, str(folder / "joined"), balanced=balanced, seed=0, tell=tell)
    return manifest, read_studies(str(folder / "joined"), manifest)


def test_every_study_is_there_once_with_its_picture_and_its_source(
    tiny_store: Any, tmp_path: Path
) -> None:
    urls = make_two(tiny_store, tmp_path)
    manifest, rows = join(urls, tmp_path)
    first, second = (read(url) for url in urls)
    assert rows == {
        **{key: replace(row, source="a") for key, row in first.items()},
        **{key: replace(row, source="b") for key, row in second.items()},
    }
    pictures = {
        sample.key: sample.pixels
        for url in urls
        for split in read_manifest(url).splits.values()
        for shard in split.shards
        for sample in read_shard(url, shard, manifest.image_size)
    }
    for name in SPLITS:
        entry = manifest.splits[name]
        samples = [
            sample
            for shard in entry.shards
            for sample in read_shard(str(tmp_path / "joined"), shard, manifest.image_size)
        ]
        assert len(samples) == entry.samples == len(of_split(rows, name))
        assert entry.positives == sum(sample.target for sample in samples)
        for sample in samples:
            np.testing.assert_array_equal(sample.pixels, pictures[sample.key])
    train = [rows[s.key].source for s in samples]
    assert {"a", "b"} == set(train)
    assert manifest.left_out == {}
    assert manifest.layout == "joined"
    assert join(urls, tmp_path)[0] == manifest  # done already


def test_who_is_in_a_stricter_split_of_any_store_is_in_no_other(
    tiny_store: Any, tmp_path: Path
) -> None:
    urls = make_two(tiny_store, tmp_path)
    first, second = (read(url) for url in urls)
    tested, chosen = of_split(first, "test")[0], of_split(first, "val")[0]
    trained, valued = of_split(second, "train"), of_split(second, "val")
    same_picture = {"pixels_digest": of_split(first, "test")[3].pixels_digest}
    change(
        urls[1],
        {
            trained[0].key: {"patient": tested.patient},
            trained[9].key: {"patient": chosen.patient},
            valued[0].key: {"patient": tested.patient},
            trained[5].key: same_picture,
        },
    )
    manifest, rows = join(urls, tmp_path)
    lost = {trained[0].key, trained[9].key, valued[0].key}
    lost |= {row.key for row in trained if row.patient == trained[5].patient}
    assert rows.keys() == (first.keys() | second.keys()) - lost
    assert sum(manifest.left_out.values()) == len(lost)
    assert manifest.audit.shared_patients == 0


@pytest.mark.parametrize(
    ("stricter", "looser"), [("test", "val"), ("test", "train"), ("val", "train")]
)
def test_who_is_in_a_stricter_split_by_a_picture_alone_is_in_no_other(
    tiny_store: Any, tmp_path: Path, stricter: str, looser: str
) -> None:
    urls = make_two(tiny_store, tmp_path)
    first, second = (read(url) for url in urls)
    keys = [row.key for row in of_split(second, looser)[:3]]
    known = of_split(first, stricter)[0].pixels_digest
    change(urls[1], {key: {"patient": "b one"} for key in keys})
    change(urls[1], {keys[1]: {"pixels_digest": known}})
    manifest, rows = join(urls, tmp_path)
    assert rows.keys() == (first.keys() | second.keys()) - set(keys)
    assert manifest.left_out == {
        f"pictures of {looser} that are there already": 1,
        f"studies of {looser} whose patient has a picture in a stricter one": 2,
    }


@pytest.mark.parametrize(("stricter", "looser"), [("test", "train"), ("val", "train")])
def test_whose_picture_is_left_out_as_known_is_in_no_looser_split(
    tiny_store: Any, tmp_path: Path, stricter: str, looser: str
) -> None:
    urls = [*make_two(tiny_store, tmp_path), str(Path(tiny_store(seed=3)).rename(tmp_path / "c"))]
    first, second, third = (of_split(read(url), stricter) for url in urls)
    looser_rows = of_split(read(urls[2]), looser)
    (tmp_path / "c" / "secret_check.txt").write_text("1\n")
    change(urls[2], {row.key: {"patient": f"c {row.patient}"} for row in third + looser_rows})
    twice = {"patient": "Q", "pixels_digest": first[0].pixels_digest}
    change(urls[1], {second[0].key: twice})
    change(urls[2], {looser_rows[0].key: {"patient": "Q"}})
    _, rows = join(urls, tmp_path)
    assert {second[0].key, looser_rows[0].key}.isdisjoint(rows)
    assert looser_rows[-1].key in rows


def test_a_picture_of_a_patient_left_out_is_in_no_looser_split(
    tiny_store: Any, tmp_path: Path
) -> None:
    urls = make_two(tiny_store, tmp_path)
    tested, chosen = of_split(read(urls[0]), "test")[0], of_split(read(urls[1]), "val")[0]
    trained = of_split(read(urls[0]), "train")[0]
    change(urls[1], {chosen.key: {"patient": tested.patient}})
    change(urls[0], {trained.key: {"pixels_digest": chosen.pixels_digest}})
    _, rows = join(urls, tmp_path)
    assert {chosen.key, trained.key}.isdisjoint(rows)


def test_who_shares_a_picture_within_a_split_stays(tiny_store: Any, tmp_path: Path) -> None:
    urls = make_two(tiny_store, tmp_path)
    first, second = (of_split(read(url), "train") for url in urls)
    change(urls[1], {row.key: {"patient": "b one"} for row in second[:3]})
    change(urls[1], {second[0].key: {"pixels_digest": first[0].pixels_digest}})
    manifest, rows = join(urls, tmp_path)
    assert second[0].key not in rows
    assert {row.key for row in second[1:]} <= rows.keys()
    assert sum(manifest.left_out.values()) == 1


def test_balanced(tiny_store: Any, tmp_path: Path) -> None:
    urls = make_two(tiny_store, tmp_path)
    train = of_split(read(urls[1]), "train")
    change(urls[1], {row.key: {"patient": "b test-0"} for row in train[:20]})
    manifest, rows = join(urls, tmp_path, balanced=True)
    numbers = [sum(row.source == name for row in of_split(rows, "train")) for name in "ab"]
    assert numbers[0] == numbers[1] == len(train) - 20
    assert manifest.left_out["studies of train, to balance the stores"] == 20


def test_two_tables_of_the_same_file_names_are_refused(tiny_store: Any, tmp_path: Path) -> None:
    """Under one secret `images/0001.png` has one key in both, whatever it shows."""
    urls = make_two(tiny_store, tmp_path)
    first, second = (sorted(read(url)) for url in urls)
    change(urls[1], {second[0]: {"key": first[0]}})
    with pytest.raises(StoreError, match="1 studies of b have keys of other studies of a"):
        join(urls, tmp_path)
    assert not (tmp_path / "joined").exists()


def test_a_joined_store_tells_the_layouts_and_the_secret_of_its_stores(
    tiny_store: Any, tmp_path: Path
) -> None:
    urls, joined = make_two(tiny_store, tmp_path), str(tmp_path / "joined")
    change(urls[0], {}, layout="chexpert")
    manifest, _ = join(urls, tmp_path)
    assert manifest.layouts == ("chexpert", "rsna")
    assert have_one_secret(joined, urls[0]) is True
    shutil.rmtree(joined)
    (tmp_path / "b" / "secret_check.txt").write_text("2\n")
    told = list[str]()
    join(urls, tmp_path, tell=told.append)
    assert "b was prepared with another secret than a" in told[0]
    assert have_one_secret(joined, urls[0]) is None
    change(urls[0], {}, layout="nih")
    with pytest.raises(StoreError, match="RSNA's patients are a part of NIH's"):
        check_stores([joined, urls[0]], told.append)


def test_each_store_is_compared_with_each(tiny_store: Any, tmp_path: Path) -> None:
    urls = [*make_two(tiny_store, tmp_path), str(Path(tiny_store(seed=3)).rename(tmp_path / "c"))]
    change(urls[0], {}, layout="chexpert")
    (tmp_path / "c" / "secret_check.txt").write_text("2\n")
    with pytest.raises(StoreError, match="c was prepared with another secret than b"):
        check_stores(urls, lambda line: None)


def test_what_cannot_be_joined(tiny_store: Any, tmp_path: Path) -> None:
    urls = make_two(tiny_store, tmp_path)
    with pytest.raises(StoreError, match="two stores have the same name"):
        join([urls[0], urls[0]], tmp_path)
    (tmp_path / "b" / "secret_check.txt").write_text("2\n")
    with pytest.raises(StoreError, match="RSNA's patients are a part of NIH's"):
        join(urls, tmp_path)
    small = str(Path(tiny_store(seed=3, image_size=40)).rename(tmp_path / "small"))
    with pytest.raises(StoreError, match="px, those of a are"):
        join([urls[0], small], tmp_path)
