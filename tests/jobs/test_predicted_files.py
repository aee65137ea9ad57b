"""What a prediction can be of besides a folder: each is told as the files that it stands for."""

import gzip
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.fileset import FileSet

from jobs.predicted_files import expand, find_source
from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import UnusableFile, read_pictures

GRAY = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)


def look(source: str) -> dict[str, GrayImage | UnusableFile]:
    """Every file that the source stands for, and its picture."""
    source_url, files = find_source(source)
    if files is None:
        prefix = f"{source_url}/"
        files = [url.removeprefix(prefix) for url in storage.list_urls(source_url)]
    paths = expand(source_url, files)
    urls = [storage.join(source_url, path) for path in paths]
    return dict(zip(paths, read_pictures(urls, 32), strict=True))


def check(found: dict[str, GrayImage | UnusableFile], *names: str) -> None:
    assert sorted(found) == sorted(names)
    for image in found.values():
        assert isinstance(image, GrayImage)
        assert (image.pixels == GRAY).all()


def encode_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GRAY).save(buffer, "PNG")
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture
def folder(tmp_path: Path, make_dicom: Any) -> Path:
    (tmp_path / "ward").mkdir()
    (tmp_path / "a.png").write_bytes(encode_png())
    (tmp_path / "ward" / "b.dcm.gz").write_bytes(gzip.compress(make_dicom(GRAY)))
    members = {"x/c.dcm": make_dicom(GRAY), "x/": b"", "__MACOSX/x/._c.dcm": b"1", ".hidden": b""}
    pack(tmp_path / "ward" / "d.zip", members)
    return tmp_path


def test_a_folder_of_all_kinds(folder: Path) -> None:
    check(look(str(folder)), "a.png", "ward/b.dcm.gz", "ward/d.zip!/x/c.dcm")


@pytest.mark.parametrize(("name", "told"), [("a.png", "a.png"), ("ward/d.zip", "d.zip!/x/c.dcm")])
def test_one_file(folder: Path, name: str, told: str) -> None:
    check(look(str(folder / name)), told)


def test_a_list_on_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [folder / "a.png", folder / "ward" / "b.dcm.gz", folder / "a.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, named)) + "\n\n"))
    check(look("-"), "a.png", "ward/b.dcm.gz")


def test_a_list_of_a_bucket_is_told_from_its_common_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("s3://b/in/1/a.dcm\ns3://b/in/12/a.dcm\n"))
    assert find_source("-") == ("s3://b/in", ["1/a.dcm", "12/a.dcm"])


def test_an_empty_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(SourceError, match="no file is named on standard input"):
        find_source("-")


def test_a_dicomdir(tmp_path: Path, make_dicom: Any) -> None:
    files = FileSet()
    for number in range(2):
        ids = {"PatientID": f"p{number}", "StudyInstanceUID": pydicom.uid.generate_uid()}
        ids |= {"SeriesInstanceUID": pydicom.uid.generate_uid(), "InstanceNumber": 1}
        ids |= {"StudyDate": "20200101", "StudyTime": "120000", "StudyID": "1", "SeriesNumber": 1}
        data = make_dicom(GRAY, identifier=f"p{number}", elements=ids)
        files.add(pydicom.dcmread(io.BytesIO(data)))
    files.write(tmp_path / "medium")
    found = look(str(tmp_path / "medium" / "DICOMDIR"))
    assert len(found) == 2
    check(found, *found)
    assert sorted(look(str(tmp_path / "medium"))) == sorted(found)


def test_what_is_damaged_is_told(tmp_path: Path, make_dicom: Any) -> None:
    packed = gzip.compress(make_dicom(GRAY))
    (tmp_path / "cut.dcm.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "bad.dcm.gz").write_bytes(b"\x1f\x8b" + b"nonsense")
    found = look(str(tmp_path))
    assert {one.reason for one in found.values() if isinstance(one, UnusableFile)} == {
        "undecodable"
    }
    assert len(found) == 2
    (tmp_path / "e.zip").write_bytes(b"no archive")
    with pytest.raises(SourceError, match=r"e\.zip: no zip archive"):
        look(str(tmp_path))
    (tmp_path / "DICOMDIR").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="no DICOMDIR"):
        find_source(str(tmp_path / "DICOMDIR"))


def test_what_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(200_000_000), 9))
    (image,) = look(str(tmp_path)).values()
    assert isinstance(image, UnusableFile)
    assert image.reason == "too_large"
