"""From a key to the file that it was made of, for whoever has the source and its secret."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import find
from pneumo.config import PrepareConfig
from pneumo.dataset.phantoms.layouts import PHANTOM_LAYOUTS
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.sources.recognition import read_source

FolderMaker = Callable[..., Path]


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1] for row in rows}


@pytest.mark.parametrize("kind", [None, "csv", "jsonl", "parquet"])
def test_every_key_leads_to_its_file(
    kaggle_folder: FolderMaker,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str | None,
) -> None:
    folder = kaggle_folder(num_studies=6)
    studies = read_source(str(folder), {}).studies
    keys = [study.key for study in studies]
    arguments = keys
    if kind is not None:
        table = tmp_path / f"keys.{kind}"
        if kind == "csv":
            table.write_text("key,split\n" + "".join(f"{key},val\n" for key in keys))
        elif kind == "jsonl":
            table.write_text("".join(json.dumps({"key": key}) + "\n" for key in keys))
        else:
            pq.write_table(pa.table({"key": keys}), table)
        arguments = ["--table", str(table)]
    assert find.main(["--source", str(folder), *arguments]) == 0
    assert lines(capsys) == {study.key: study.url for study in studies}


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("chexpert", {"uncertain": "positive"}), ("nih", {"positive": ["Effusion"]})],
)
def test_settings_of_the_preparation_are_not_needed(
    layout: str, settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_phantoms(tmp_path, num_studies=12, seed=1, layout=PHANTOM_LAYOUTS[layout])
    if layout == "nih":  # as in a part of the data set without a label Pneumonia
        table = tmp_path / "Data_Entry_2017.csv"
        table.write_text(table.read_text().replace("Pneumonia", "Effusion"))
    else:
        table = tmp_path / "train.csv"
        table.write_text(table.read_text().replace(",1.0,", ",-1.0,"))
    config = PrepareConfig.model_validate(settings)
    studies = read_source(str(tmp_path), {}, settings=config).studies
    assert find.main(["--source", str(tmp_path), *(study.key for study in studies)]) == 0
    assert lines(capsys) == {study.key: study.url for study in studies}


def test_files_whose_names_are_no_utf_8_are_found(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    for label in ("NORMAL", "PNEUMONIA"):
        (tmp_path / "train" / label).mkdir(parents=True)
        name = f"{label}\N{CJK UNIFIED IDEOGRAPH-80F8}.jpeg".encode("gbk")
        (tmp_path / "train" / label / os.fsdecode(name)).write_bytes(b"")
    studies = read_source(str(tmp_path), {}).studies
    assert find.main(["--source", str(tmp_path), *(study.key for study in studies)]) == 0
    expected = [f"{study.key}\t{study.url}\n" for study in studies]
    assert capfdbinary.readouterr().out == os.fsencode("".join(expected))
    assert find.main(["--source", str(tmp_path), "0" * 20]) == 1


def test_contradictions_are_found_though_no_study_is_made_of_them(
    kaggle_folder: FolderMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kaggle_folder(num_studies=6)
    whole = {study.key: study.url for study in read_source(str(folder), {}).studies}
    labels = folder / "stage_2_train_labels.csv"
    first = labels.read_text().splitlines()[1]
    target = "0" if first.endswith("1") else "1"
    labels.write_text(labels.read_text() + f"{first[:-1]}{target}\n")
    (rejected,) = read_source(str(folder), {}).rejected
    assert find.main(["--source", str(folder), rejected.key]) == 0
    assert lines(capsys) == {rejected.key: whole[rejected.key]}


def test_keys_of_another_secret_are_told(
    kaggle_folder: FolderMaker,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = kaggle_folder(num_studies=4)
    key = read_source(str(folder), {}).studies[0].key
    monkeypatch.setenv("PNEUMO_HASH_KEY", "another")
    assert find.main(["--source", str(folder), key]) == 1
    assert (
        "1 of 1 keys belong to no file of this source with this secret" in capsys.readouterr().err
    )


def test_no_secret_is_made(kaggle_folder: FolderMaker, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kaggle_folder(num_studies=4)
    assert find.main(["--source", str(folder), "0" * 20]) == 2
    assert "PNEUMO_HASH_KEY" in capsys.readouterr().err
    assert not (folder / ".pneumo").exists()


def test_the_quarantine_of_a_clean_store_has_no_keys_and_debug_shows_the_traceback(
    kaggle_folder: FolderMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kaggle_folder(num_studies=4)
    read_source(str(folder), {})  # makes the secret
    (tmp_path / "quarantine.jsonl").write_text("")
    flags = ["--source", str(folder), "--table"]
    assert find.main([*flags, str(tmp_path / "quarantine.jsonl")]) == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "keys.csv").write_text("split\nval\n")
    assert find.main([*flags, str(tmp_path / "keys.csv"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_without_files_is_told_before_its_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "typo"):
        assert find.main(["--source", str(folder), "abc"]) == 2
        assert "no such folder, or nothing in it" in capsys.readouterr().err
