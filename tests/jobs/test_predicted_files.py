"""What a prediction can be of besides a folder: each is told as the files that it stands for."""

import gzip
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.fileset import FileSet

from jobs.predicted_files import expand, find_files, find_source
from pneumo import storage
from pneumo.errors import SourceError
from pneumo.images.dicom import GrayImage
from pneumo.images.dicom_files import UnusableFile, read_pictures

GRAY = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)


def give_list(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def look(source: str) -> dict[str, GrayImage | UnusableFile]:
    """Every file that the source stands for, and its picture."""
    source_url, paths = find_files(source, "/nowhere")
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


def test_the_output_may_be_below_the_source_or_above_it(folder: Path) -> None:
    (folder / "ward" / "d.zip").unlink()
    assert find_files(str(folder), str(folder / "ward"))[1] == ["a.png"]
    assert find_files(str(folder / "ward"), str(folder))[1] == ["b.dcm.gz"]
    with pytest.raises(SourceError, match="is also --output; give another folder"):
        find_files(str(folder), f"{folder}/")


def test_the_output_is_found_through_links_and_dots(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "ward" / "d.zip").unlink()
    (folder / "link").symlink_to(folder / "ward")
    (folder / "again").symlink_to(folder / "ward")
    monkeypatch.chdir(folder / "ward")
    for source in (f"../../{folder.name}", str(folder)):
        assert find_files(source, str(folder / "link"))[1] == ["a.png"]
    for source in ("../ward", str(folder / "link")):
        with pytest.raises(SourceError, match="is also --output; give another folder"):
            find_files(source, str(folder / "ward"))


def test_a_source_that_would_be_removed_as_overlays_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = folder / "overlays" / "ward"
    inside.mkdir(parents=True)
    (inside / "b.png").write_bytes(encode_png())
    for source in (inside, inside.parent, inside / "b.png"):
        with pytest.raises(SourceError, match="has files in overlays/ of --output"):
            find_files(str(source), str(folder))
    give_list(monkeypatch, f"{folder}/a.png\n{inside}/b.png\n".encode())
    with pytest.raises(SourceError, match="has files in overlays/ of --output"):
        find_files("-", str(folder))
    storage.write_bytes("memory:///bucket/four/overlays/a.png", encode_png())
    with pytest.raises(SourceError, match="has files in overlays/ of --output"):
        find_files("memory:///bucket/four/overlays", "memory:///bucket/four")


def test_one_object_of_a_bucket() -> None:
    storage.write_bytes("memory:///bucket/one/a.png", encode_png())
    storage.write_bytes("memory:///bucket/one/b.png", encode_png())
    check(look("memory:///bucket/one/a.png"), "a.png")
    check(look("memory:///bucket/one"), "a.png", "b.png")
    storage.write_bytes("memory:///bucket/two/.hidden", b"")
    for nothing in ("memory:///bucket/two", "memory://bucket/three"):
        with pytest.raises(SourceError, match="no file in it"):
            find_files(nothing, "memory:///bucket/out")


def test_a_list_on_standard_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = [folder / "a.png", folder / "ward" / "b.dcm.gz", folder / "a.png"]
    for separator in ("\n", "\r\n", "\0"):
        give_list(monkeypatch, f"{separator.join(map(str, named))}{separator * 2}".encode())
        check(look("-"), "a.png", "ward/b.dcm.gz")


def test_a_list_of_any_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["~nobody.png", os.fsdecode(b"\xe9.png"), "[x]*?#%2F.png", "-.png"]
    for name in names:
        (tmp_path / name).write_bytes(encode_png())
    monkeypatch.chdir(tmp_path)
    give_list(monkeypatch, b"\n".join(map(os.fsencode, names)))
    check(look("-"), *names)
    names.append(" spaces ")  # `find -print0` gives names as they are
    (tmp_path / names[-1]).write_bytes(encode_png())
    give_list(monkeypatch, b"\0".join(map(os.fsencode, names)))
    check(look("-"), *names)


def test_a_list_of_a_bucket_is_told_from_its_common_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_list(monkeypatch, b"s3://b/in/1/a.dcm\ns3://b/in/12/a.dcm\n")
    assert find_source("-") == ("s3://b/in", ["1/a.dcm", "12/a.dcm"])


def test_an_empty_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_list(monkeypatch, b"\n")
    with pytest.raises(SourceError, match="no file is named on standard input"):
        find_source("-")


def test_a_dicomdir(tmp_path: Path, make_dicom: Any) -> None:
    files = FileSet()
    for number in range(2):
        ids = {"PatientID": f"p{number}", "StudyInstanceUID": pydicom.uid.generate_uid()}
        ids |= {"SeriesInstanceUID": pydicom.uid.generate_uid(), "StudyID": "1"}
        ids |= {"StudyDate": "20200101", "StudyTime": "120000"}
        elements = {**ids, "InstanceNumber": 1, "SeriesNumber": 1}
        data = make_dicom(GRAY, identifier=f"p{number}", elements=elements)
        files.add(pydicom.dcmread(io.BytesIO(data)))
    files.write(tmp_path / "medium")
    found = look(str(tmp_path / "medium" / "DICOMDIR"))
    assert len(found) == 2
    check(found, *found)
    assert sorted(look(str(tmp_path / "medium"))) == sorted(found)
    data = (tmp_path / "medium" / "DICOMDIR").read_bytes()
    storage.write_bytes("memory://bucket/medium/DICOMDIR", data)
    listed = find_source("memory://bucket/medium/DICOMDIR")
    assert listed == ("memory://bucket/medium", list(found))
    # As Linux mounts a CD.
    for path in sorted((tmp_path / "medium").rglob("*"), reverse=True):
        path.rename(path.with_name(path.name.lower()))
    small = [name.lower() for name in found]
    check(look(str(tmp_path / "medium" / "dicomdir")), *small)
    check(look(str(tmp_path / "medium")), *small)


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
    damaged = look(str(tmp_path))["e.zip"]
    assert isinstance(damaged, UnusableFile)
    assert (damaged.reason, damaged.message) == ("undecodable", "cannot be unpacked: BadZipFile")
    with pytest.raises(SourceError, match=r"e\.zip: no zip archive"):
        look(str(tmp_path / "e.zip"))
    (tmp_path / "DICOMDIR").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="no DICOMDIR"):
        find_source(str(tmp_path / "DICOMDIR"))


def test_archives_in_capitals_and_what_is_only_called_so(tmp_path: Path) -> None:
    pack(tmp_path / "A.ZIP", {"b.png": encode_png()})
    (tmp_path / "c.zip").mkdir()
    (tmp_path / "c.zip" / "d.png").write_bytes(encode_png())
    check(look(str(tmp_path)), "A.ZIP!/b.png", "c.zip/d.png")
    check(look(str(tmp_path / "c.zip")), "d.png")
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "link.zip").symlink_to("nowhere")
    source_url, _ = find_source(str(tmp_path))
    names = ["link.zip", "pipe.zip"]
    assert expand(source_url, names) == names


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_is_told(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("b.png", encode_png())
    data = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data[:60] + bytes(20) + data[80:])
    (image,) = look(str(tmp_path)).values()
    assert isinstance(image, UnusableFile)
    assert image.reason == "undecodable"


def test_what_unpacks_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(200_000_000), 9))
    (image,) = look(str(tmp_path)).values()
    assert isinstance(image, UnusableFile)
    assert image.reason == "too_large"
