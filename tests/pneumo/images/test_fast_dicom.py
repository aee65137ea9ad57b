"""The fast reader of DICOM files says what pydicom says."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydicom.encaps import encapsulate

from pneumo.images.dicom import read_study_image
from pneumo.images.fast_dicom import read_baseline
from tests.examples import examples
from tests.pneumo.images.pictures import DicomMaker, outcome, phantom

pytestmark = pytest.mark.processors


@examples(300)
@example([(746, 1)], [], None)  # an offset of the frame that leads into its bytes
@given(
    st.lists(st.tuples(st.integers(144, 1100), st.integers(0, 255)), max_size=4),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=2),
    st.none() | st.floats(0.2, 1),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of values that are none
def test_pydicom_says_the_same_of_a_changed_file(
    make_dicom: DicomMaker,
    in_header: list[tuple[int, int]],
    anywhere: list[tuple[float, int]],
    cut: float | None,
) -> None:
    elements = {"PatientAge": "047Y", "ImagerPixelSpacing": [0.2, 0.2], "SeriesDescription": "view"}
    data = bytearray(make_dicom(phantom(64), jpeg_quality=90, elements=elements))
    for place, value in in_header:
        data[place] = value
    for share, value in anywhere:
        data[144 + int(share * (len(data) - 145))] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    # Without its preamble the same file is none of the usual kind, and left to pydicom.
    fast, slow = outcome(bytes(data)), outcome(bytes(data[132:]))  # why refused may differ
    assert fast == slow or len(fast) == len(slow) == 1


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "elements",
    [
        {},
        {"PatientID": "Jürgen^Ä", "SpecificCharacterSet": "ISO_IR 100"},
        {"PatientAge": "7", "PatientSex": "O", "ViewPosition": "LL"},
        {"PatientSex": ["M", "F"]},
        {"PixelSpacing": None, "ImagerPixelSpacing": [0.2, 0.3]},
        {"PixelSpacing": [], "ImagerPixelSpacing": []},
        {"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.2, 0.1]},
        {"NumberOfFrames": 1},
        {"NumberOfFrames": 2},
        {"WindowCenter": 100, "WindowWidth": 50},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"},
        {"SOPClassUID": None},
        {"BitsStored": 7, "HighBit": 6},
        {"PixelRepresentation": 1},
        {"Rows": 65},
        {"PixelAspectRatio": [2, 1]},
        *({"PresentationLUTShape": shape} for shape in ("INVERSE", " INVERSE", " IDENTITY")),
        {"PixelData": encapsulate([b"\xff\xd8 no JPEG"])},
    ],
    ids=str,
)
def test_pydicom_says_the_same_of_an_unusual_header(
    make_dicom: DicomMaker, elements: dict[str, Any], photometric: str
) -> None:
    elements = {"PhotometricInterpretation": photometric, **elements}
    data = make_dicom(phantom(64), jpeg_quality=90, elements=elements)
    assert outcome(data) == outcome(data[132:])


@pytest.mark.parametrize(("count", "is_fast"), [(1_000, True), (10_000, False)])
def test_a_file_of_very_many_elements_is_left_to_pydicom(
    make_dicom: DicomMaker, count: int, is_fast: bool
) -> None:
    data = make_dicom(phantom(64), jpeg_quality=90)
    place = data.index(b"\x28\0\x02\0US")
    many = b"".join(struct.pack("<HH2sH", 0x21, number, b"UI", 0) for number in range(count))
    data = data[:place] + many + data[place:]
    assert (read_baseline(data, {}) is not None) == is_fast
    assert outcome(data) == outcome(data[132:])


def test_pydicom_says_the_same_of_real_files(shared_data: Path) -> None:
    for path in sorted((shared_data / "rsna-mini" / "stage_2_train_images").glob("*.dcm"))[:60]:
        data = path.read_bytes()
        fast, slow = read_study_image(data, 224), read_study_image(data[132:], 224)
        np.testing.assert_array_equal(fast.pixels, slow.pixels)
        assert (fast.header, fast.identifier) == (slow.header, slow.identifier)
