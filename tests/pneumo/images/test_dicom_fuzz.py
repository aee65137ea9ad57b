"""Damaged files of every transfer syntax give a picture or a documented reason, and nothing else.

Decoders in C and C++ may crash, hang or fill the memory, so the examples run in processes of their
own. `run_campaign` restarts such a process after a crash and says which example it was; an example
is made from its number alone. A larger campaign:

    DICOM_FUZZ_EXAMPLES=20000 python -m pytest tests/pneumo/images/test_dicom_fuzz.py -s
"""

import base64
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import methodcaller
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from pneumo.errors import DicomError, DicomReason
from pneumo.images.dicom import decode_gray, read_study_image
from tests import CHECKOUT

REASONS = set(get_args(DicomReason))
NUM_EXAMPLES = int(os.environ.get("DICOM_FUZZ_EXAMPLES", "300"))
SIZE = 32
TIME_LIMIT_S = 60  # of the CPU's time: what takes as long hangs, on any machine
MEMORY_LIMIT_MIB = 1024
LARGEST_SEED_BYTES = 150_000

# 16 x 16 of 8 bits, made with OpenJPH: nothing in the `codecs` extra writes HTJ2K.
HTJ2K_FRAME = base64.b85decode(
    "|4;u>04YEK0000G0000G00000000000000G0000G0000000000009R90sl|{2mk^A00092QUDA90ssL31q1{@0smY"
    "86Cg-XP*6}%P*6}%P*6}vNJ#%=02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000UH}3AlfWh80Ect{0KgK!5`ZE"
    "Bhjak&0LOFyz!N|c01(Il0(1a~6H@@d6%YiVhG7`0aDsIJ;>YZ?0Kh9C6M*jS?(XNnr>CdFcmM$XgRZ)k0RPz"
)
ELEMENTS = {
    "SamplesPerPixel": 0x0002,
    "PlanarConfiguration": 0x0006,
    "Rows": 0x0010,
    "Columns": 0x0011,
    "BitsAllocated": 0x0100,
    "BitsStored": 0x0101,
    "HighBit": 0x0102,
    "PixelRepresentation": 0x0103,
    "PixelPaddingValue": 0x0120,
    "LUTDescriptor": 0x3002,
}
EXTREMES = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 64, 255, 256, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)


# --- the files that are damaged


@cache
def seed_files() -> tuple[tuple[str, bytes], ...]:
    """(name, bytes): pydicom's own small test files, and one made of every further syntax."""
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= LARGEST_SEED_BYTES:
            data = path.read_bytes()
            if b"\xe0\x7f\x10\x00" in data or b"\x7f\xe0\x00\x10" in data:
                found.append((str(path.relative_to(folder)), as_radiograph(data)))
    return (*found, *made_files())


def as_radiograph(data: bytes) -> bytes:
    """`data` under a SOP class of the same length or shorter that is read."""
    classes = re.findall(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1[.0-9]*", data)
    for uid in sorted(set(classes), key=len, reverse=True):
        radiograph = SecondaryCaptureImageStorage.encode()[: len(uid)]
        data = data.replace(uid, radiograph.ljust(len(uid), b"\0"))
    return data


def made_files() -> list[tuple[str, bytes]]:
    """Radiographs, so that they get past the check of the SOP class, of each syntax."""
    ramp = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)
    made = [("made/plain", write_file(ramp))]
    for name, syntax in [
        ("rle", RLELossless),
        ("jpeg-ls", JPEGLSLossless),
        ("jpeg-2000", JPEG2000Lossless),
    ]:
        made.append((f"made/{name}", write_file(ramp, methodcaller("compress", syntax))))
    ht = np.zeros((16, 16), np.uint8)
    made.append(("made/htj2k", write_file(ht, lambda d: set_frame(d, HTJ2KLossless, HTJ2K_FRAME))))
    made += [
        ("made/jpeg", write_file(ramp.astype(np.uint8), set_jpeg)),
        ("made/jpeg-12", write_file(ramp, set_extended_jpeg)),
        ("made/jpeg-lossless", write_file(ramp, set_lossless_jpeg)),
        ("made/tables", write_file(ramp, add_tables)),
        ("made/deflated", deflate(write_file(ramp, add_tables))),
        ("made/bare", write_file(ramp)[132:]),
    ]
    return made


def write_file(
    pixels: np.ndarray[Any, Any], change: Callable[[pydicom.Dataset], None] = lambda d: None
) -> bytes:
    """A secondary capture of `pixels`, 8 or 16 bits."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    change(dataset)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def set_frame(dataset: pydicom.Dataset, syntax: pydicom.uid.UID, frame: bytes | bytearray) -> None:
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def set_jpeg(dataset: pydicom.Dataset) -> None:
    from PIL import Image

    frame = io.BytesIO()
    pixels = np.frombuffer(dataset.PixelData, np.uint8).reshape(dataset.Rows, dataset.Columns)
    Image.fromarray(pixels).save(frame, "JPEG")
    set_frame(dataset, pydicom.uid.JPEGBaseline8Bit, frame.getvalue())


def set_extended_jpeg(dataset: pydicom.Dataset) -> None:
    import imagecodecs

    frame = imagecodecs.jpeg8_encode(_stored(dataset), level=100, bitspersample=12)
    set_frame(dataset, pydicom.uid.JPEGExtended12Bit, frame)
    dataset.BitsStored, dataset.HighBit = 12, 11


def set_lossless_jpeg(dataset: pydicom.Dataset) -> None:
    import imagecodecs

    frame = imagecodecs.jpeg8_encode(_stored(dataset), lossless=True, bitspersample=16)
    set_frame(dataset, pydicom.uid.JPEGLosslessSV1, frame)


def _stored(dataset: pydicom.Dataset) -> np.ndarray[Any, Any]:
    return np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns)


def add_tables(dataset: pydicom.Dataset) -> None:
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        item = pydicom.Dataset()
        item.LUTDescriptor = [16, 0, 12]
        item.LUTData = np.arange(16, dtype=np.uint16).tobytes()
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
        setattr(dataset, keyword, [item])
    dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = 0, 3


def deflate(data: bytes) -> bytes:
    """`data`, explicit VR little endian, with its data set deflated."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


# --- the damage


def make_example(index: int) -> tuple[str, bytes]:
    """(what was done, bytes) of example `index`."""
    rng = random.Random(f"dicom/{index}")
    seeds = seed_files()
    name, original = seeds[index % len(seeds)]
    data, done = bytearray(original), [name]
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        way = rng.choice(WAYS)
        way(rng, data)
        done.append(way.__name__)
    return " ".join(done), bytes(data)


def _place(rng: random.Random, data: bytearray) -> int:
    """Somewhere in `data`, often where its header or its codestream starts."""
    pixels = max(data.find(b"\xe0\x7f\x10\x00"), 0)
    starts = [0, 128, len(data) - 200, pixels, pixels, pixels, pixels, pixels]
    if rng.random() < 0.7:
        return min(max(rng.choice(starts) + rng.randrange(250), 0), len(data) - 1)
    return rng.randrange(len(data))


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 4, 40))):
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    place, length = _place(rng, data), rng.choice((1, 2, 4, 16))
    data[place : place + length] = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * length


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[max(_place(rng, data), _place(rng, data)) :]


def insert(rng: random.Random, data: bytearray) -> None:
    place = _place(rng, data)
    data[place:place] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def swap(rng: random.Random, data: bytearray) -> None:
    first, second, length = _place(rng, data), _place(rng, data), rng.choice((2, 16, 256))
    chunk = data[first : first + length]
    data[first : first + length] = data[second : second + length]
    data[second : second + length] = chunk


def splice(rng: random.Random, data: bytearray) -> None:
    other = rng.choice(seed_files())[1]
    start, place = rng.randrange(len(other)), _place(rng, data)
    chunk = other[start : start + rng.choice((16, 256, 4096))]
    data[place : place + rng.choice((0, len(chunk)))] = chunk


def set_element(rng: random.Random, data: bytearray) -> None:
    """An extreme number in an element of the image pixel module, little endian."""
    tag = struct.pack("<HH", 0x28, rng.choice([*ELEMENTS.values()]))
    at = data.find(tag)
    if at >= 0 and at + 10 <= len(data):
        struct.pack_into("<H", data, at + 8, rng.choice(EXTREMES))


def set_size(rng: random.Random, data: bytearray) -> None:
    """An extreme number near the size in a codestream."""
    markers = [b"\xff\xc0", b"\xff\xc1", b"\xff\xc3", b"\xff\xf7", b"\xff\x4f\xff\x51", b"\xff\x52"]
    places = [data.find(marker) for marker in markers]
    at = rng.choice(places) + rng.randrange(2, 45)
    if 0 <= at <= len(data) - 2:
        struct.pack_into(">H", data, at, rng.choice(EXTREMES))


WAYS = (flip, overwrite, truncate, insert, swap, splice, set_element, set_size)


# --- processes that read them


@dataclass
class Campaign:
    """What reading damaged files gave."""

    examples: int
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    """Crashes, hangs, wrong exceptions: example, what was done to which file, what came of it."""
    worst_s: float = 0.0
    worst: str = ""
    peak_mib: int = 0
    peak: str = ""


def run_campaign(num_examples: int, folder: Path) -> Campaign:
    """Read `num_examples` damaged files in processes of their own; notes are kept in `folder`."""
    campaign = Campaign(num_examples)
    start = 0
    while start < num_examples:
        notes = folder / f"{start}.jsonl"
        stop = min(start + 1000, num_examples)
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.pneumo.images.test_dicom_fuzz",
                str(start),
                str(stop),
                notes,
            ],
            cwd=CHECKOUT,
            capture_output=True,
            check=False,
        )
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        for line in lines:
            _note(campaign, line)
        if process.returncode == 0:
            start = stop
            continue
        broken = start + len(lines)
        what = "took too long" if process.returncode == -signal.SIGPROF else "crashed"
        campaign.failures.append(
            f"{broken} ({make_example(broken)[0]}): {what}, {process.returncode}, "
            f"{process.stderr[-300:].decode(errors='replace')}"
        )
        start = broken + 1
    return campaign


def _note(campaign: Campaign, line: dict[str, Any]) -> None:
    campaign.outcomes[line["outcome"]] += 1
    if line["outcome"] not in REASONS | {"picture"}:
        campaign.failures.append(f"{line['index']} ({line['done']}): {line['outcome']}")
    if line["seconds"] > campaign.worst_s:
        campaign.worst_s, campaign.worst = line["seconds"], f"{line['index']} {line['done']}"
    if line["mib"] > campaign.peak_mib:
        campaign.peak_mib, campaign.peak = line["mib"], f"{line['index']} {line['done']}"


def read_examples(start: int, stop: int, notes: Path) -> None:
    """What a process of a campaign does: one line for each example that it got through."""
    with notes.open("w") as file:
        for index in range(start, stop):
            done, data = make_example(index)
            # SIGPROF ends the process, also in C code. It counts CPU time: machines are shared.
            signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
            begin = time.process_time()
            outcome = describe_outcome(data)
            line = {
                "index": index,
                "done": done,
                "outcome": outcome,
                "seconds": time.process_time() - begin,
                "mib": peak_mib(),
            }
            signal.setitimer(signal.ITIMER_PROF, 0)
            file.write(json.dumps(line) + "\n")
            file.flush()


def peak_mib() -> int:
    """The most memory that this process has held; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def describe_outcome(data: bytes) -> str:
    """'picture', a reason, or what should not have happened."""
    try:
        image = read_study_image(data, SIZE)
    except DicomError as error:
        return error.reason
    except Exception as error:
        return f"raised {error!r}"
    good = image.pixels.shape == (SIZE, SIZE) and image.pixels.dtype == np.uint8
    return "picture" if good else f"a picture of {image.pixels.shape}, {image.pixels.dtype}"


def test_the_made_files_are_the_pictures_that_they_are_made_of() -> None:
    ramp = np.arange(64 * 48, dtype=np.uint16).reshape(64, 48)
    expected = np.rint(ramp * (255 / ramp.max()))
    for name, data in made_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of the file without a preamble
            gray = decode_gray(pydicom.dcmread(io.BytesIO(data), force=True)).astype(int)
        if name == "made/htj2k":
            np.testing.assert_array_equal(gray, np.arange(256).reshape(16, 16).T)
        elif name == "made/jpeg":
            assert np.abs(gray - (ramp % 256)).mean() < 8  # of its loss
        elif "tables" not in name and "deflated" not in name:
            assert np.abs(gray - expected).max() <= 1


CLAIMING = ("made/jpeg", "made/jpeg-12", "made/jpeg-lossless", "made/jpeg-ls", "made/jpeg-2000",
            "made/htj2k", "made/rle", "made/deflated")  # fmt: skip
CLAIMED = {65_535: {"too_large"}, 7_900: {"undecodable", "picture"}}
"""What may become of a file by the side that it claims."""


@pytest.fixture(scope="module")
def claims() -> dict[tuple[str, int], tuple[str, int]]:
    """By file and claimed side the outcome and the MiB that it took, in a process of its own."""
    code = (
        "import sys, warnings; from tests.pneumo.images import test_dicom_fuzz as fuzz; "
        "warnings.simplefilter('ignore'); fuzz.read_claims()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    rows = (line.split() for line in process.stdout.splitlines())
    return {(name, int(side)): (outcome, int(mib)) for name, side, outcome, mib in rows}


def read_claims() -> None:
    """What the process does; it prints a line for each file and side."""
    for name in CLAIMING:
        for side in CLAIMED:
            data = claim_size(name, side)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            print(name, side, describe_outcome(data), peak_mib(), flush=True)


@pytest.mark.parametrize("side", CLAIMED)
@pytest.mark.parametrize("name", CLAIMING)
def test_a_small_file_that_claims_much_takes_little_memory(
    claims: dict[tuple[str, int], tuple[str, int]], name: str, side: int
) -> None:
    outcome, mib = claims[name, side]
    assert outcome in CLAIMED[side]
    assert mib < MEMORY_LIMIT_MIB


def claim_size(name: str, side: int) -> bytes:
    """The seed `name`, with `side` x `side` pixels in its header and in its codestream."""
    if name == "made/deflated":
        return deflate(claim_size("made/tables", side))
    data = bytearray(dict(made_files())[name])
    for element in (0x10, 0x11):
        at = data.find(struct.pack("<HH", 0x28, element))
        struct.pack_into("<H", data, at + 8, side)
    for marker in (b"\xff\xc0\x00", b"\xff\xc1\x00", b"\xff\xc3\x00", b"\xff\xf7\x00"):
        if (at := data.find(marker)) >= 0:
            struct.pack_into(">HH", data, at + 5, side, side)
    if (at := data.find(b"\xff\x4f\xff\x51")) >= 0:
        struct.pack_into(">II", data, at + 8, side, side)
        struct.pack_into(">II", data, at + 24, side, side)
    return bytes(data)


def test_a_frame_of_64_million_pixels_of_16_bits_takes_little_memory() -> None:
    code = (
        "import numpy as np; from tests.pneumo.images import test_dicom_fuzz as fuzz; "
        "data = fuzz.write_file(np.arange(64_000_000, dtype=np.uint16).reshape(8000, 8000)); "
        "open('/proc/self/clear_refs', 'w').write('5'); "  # the peak starts anew
        "print(fuzz.describe_outcome(data), fuzz.peak_mib())"
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=CHECKOUT, capture_output=True, check=True
    )
    outcome, mib = process.stdout.split()
    assert outcome == b"picture"
    assert int(mib) < MEMORY_LIMIT_MIB * 3 // 4


@pytest.mark.parametrize(
    "num_examples", [NUM_EXAMPLES, pytest.param(5000, marks=[pytest.mark.slow])]
)
@pytest.mark.timeout(1200)
def test_damaged_files_give_a_picture_or_a_reason(tmp_path: Path, num_examples: int) -> None:
    campaign = run_campaign(num_examples, tmp_path)
    print(campaign)
    assert not campaign.failures, "\n".join(campaign.failures)
    assert campaign.peak_mib < MEMORY_LIMIT_MIB, campaign.peak
    assert campaign.outcomes["picture"] > 0
    assert campaign.outcomes.total() == num_examples


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    read_examples(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
