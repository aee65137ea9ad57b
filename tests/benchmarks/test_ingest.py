"""The benchmarks of decoding and preparing run at tiny sizes, so that a change cannot
break them unnoticed."""

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import decode, prepare
from tests.conftest import encode_dicom


def test_decoding_is_compared_in_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (64, 64), dtype=np.uint8)
        (tmp_path / f"{i}.dcm").write_bytes(encode_dicom(pixels, jpeg_quality=90))
    flags = ["--source", str(tmp_path), "--image-size", "32", "--rounds", "1"]
    assert decode.main(flags) == 0
    told, header, *rows = capsys.readouterr().out.splitlines()
    assert told == "2 files, 32 px, 1 rounds, one thread"
    assert header.split()[:2] == ["decoder", "ms"]
    assert {"headers only", "pixel_array + area", "read_study_image"} <= {
        row[:24].strip() for row in rows
    }
    assert decode.main(["--source", str(tmp_path / "none")]) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_job_is_compared_with_bare_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-studies", "120", "--image-size", "32", "--rounds", "1"]
    assert prepare.main(["rate", *flags]) == 0
    told = capsys.readouterr().out
    for label in ("bare decode", "jobs.prepare", "rate kept", "of CPU time"):
        assert label in told


@pytest.mark.slow
def test_memory_is_told_by_number_of_studies(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["memory", "--sizes", "120"]) == 0
    number, *held, _ = capsys.readouterr().out.splitlines()[-1].split()
    assert number == "120"
    assert all(0 < float(mib) < 4096 for mib in held)


def test_the_index_is_told_where_the_metadata_is_at_hand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare.main(["index"]) == 0
    assert capsys.readouterr().out.startswith("index: ")
