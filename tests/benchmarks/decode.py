"""How fast a study's file becomes a picture, and how far from the full decode it is.

    python -m tests.benchmarks.decode [--source DIR] [--image-size 224] [--files 60] [--rounds 5]

One table: medians of process CPU time, every decoder in turn for each file, so that a busy machine
slows all of them alike. Without --source the research data beside the checkout, else phantoms.
"""

import argparse
import contextlib
import importlib.util
import io
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import simplejpeg
from pydicom.pixels.utils import pixel_array
from threadpoolctl import threadpool_limits

from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.images.dicom import read_study_image
from pneumo.images.letterbox import letterbox
from pneumo.images.pictures import read_picture
from tests.benchmarks.sources import find_real_data

Decoder = Callable[[bytes, int], npt.NDArray[Any] | None]
_REFERENCE = "pixel_array + area"


def read_headers(data: bytes, image_size: int) -> None:
    pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)


def read_by_area(data: bytes, image_size: int) -> npt.NDArray[Any]:
    stored = pixel_array(pydicom.dcmread(io.BytesIO(data)), decoding_plugin="pillow")
    return np.asarray(cv2.resize(stored, (image_size, image_size), interpolation=cv2.INTER_AREA))


def read_as_the_original(data: bytes, image_size: int) -> npt.NDArray[Any]:
    """As the project that this one grew from: floats, no antialiasing, and the plugin that pydicom
    takes where gdcm is installed."""
    stored = pixel_array(pydicom.dcmread(io.BytesIO(data)), decoding_plugin="gdcm")
    return np.asarray(cv2.resize(stored / 255, (image_size, image_size)) * 255)


def read_with_pneumo(data: bytes, image_size: int) -> npt.NDArray[Any]:
    return read_study_image(data, image_size).pixels


def list_decoders() -> dict[str, Decoder]:
    decoders: dict[str, Decoder] = {"headers only": read_headers, _REFERENCE: read_by_area}
    if importlib.util.find_spec("gdcm"):
        decoders["original project (gdcm)"] = read_as_the_original
    return decoders | {"read_study_image": read_with_pneumo}


@contextlib.contextmanager
def find_files(source: Path | None, num_files: int) -> Iterator[list[Path]]:
    """DICOM files of `source`, of the research data, or of phantoms written for the purpose."""
    folder = source or find_real_data("rsna-mini")
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch)
            write_phantoms(folder / "phantoms", num_studies=num_files, seed=0)
        yield sorted(folder.rglob("*.dcm"))[:num_files]


def measure(files: Sequence[bytes], image_size: int, rounds: int) -> list[str]:
    """The rows of the table."""
    decoders = list_decoders()
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    rng = random.Random(0)
    for _ in range(rounds):
        for data in files:
            # In random order: each leaves caches and heap to the next as it finds them.
            for name in rng.sample(sorted(decoders), len(decoders)):
                begin = time.process_time()
                decoders[name](data, image_size)
                seconds[name].append(time.process_time() - begin)
    reference = statistics.median(seconds[_REFERENCE])
    rows = [f"{'decoder':<24}{'ms':>8}{'images/s/core':>15}{'ratio':>8}{'mean diff':>11}{'max':>7}"]
    for name, decode in decoders.items():
        median = statistics.median(seconds[name])
        row = f"{name:<24}{median * 1e3:>8.2f}{1 / median:>15.0f}{reference / median:>8.2f}"
        rows.append(row + describe_difference(decode, files, image_size))
    return rows


def measure_pictures(files: Sequence[bytes], image_size: int, rounds: int) -> list[str]:
    """The same for the same pictures as PNG and JPEG, beside their library's decoding alone."""
    rows = []
    for ending in (".png", ".jpg"):
        encoded = [_encode(data, ending) for data in files]
        decoders = _list_picture_decoders(
            _decode_png if ending == ".png" else _decode_jpeg, image_size
        )
        seconds: dict[str, list[float]] = {name: [] for name in decoders}
        for _ in range(rounds):
            for data in encoded:
                for name, decode in decoders.items():
                    begin = time.process_time()
                    decode(data)
                    seconds[name].append(time.process_time() - begin)
        median = {name: statistics.median(own) for name, own in seconds.items()}
        rows += [
            f"{ending} {name:<20}{own * 1e3:>8.2f}{1 / own:>15.0f}{median['library'] / own:>8.2f}"
            for name, own in median.items()
        ]
    return rows


def _list_picture_decoders(
    decode: Callable[[bytes], npt.NDArray[Any]], image_size: int
) -> dict[str, Callable[[bytes], object]]:
    """The library's `decode` alone and with the letterbox after it, and what the product calls."""
    return {
        "library": decode,
        "library + letterbox": lambda data: letterbox(decode(data), image_size),
        "read_picture": lambda data: read_picture(data, image_size),
    }


def _encode(data: bytes, ending: str) -> bytes:
    pixels = pixel_array(pydicom.dcmread(io.BytesIO(data)), decoding_plugin="pillow")
    ok, encoded = cv2.imencode(ending, pixels)
    assert ok
    return encoded.tobytes()


def _decode_png(data: bytes) -> npt.NDArray[Any]:
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    return np.asarray(decoded)


def _decode_jpeg(data: bytes) -> npt.NDArray[Any]:
    return np.asarray(simplejpeg.decode_jpeg(data, "GRAY")[..., 0])


def describe_difference(decode: Decoder, files: Sequence[bytes], image_size: int) -> str:
    """Mean and greatest difference in gray levels from the full decode, resampled by area."""
    means, greatest = [], 0.0
    for data in files:
        pixels = decode(data, image_size)
        if pixels is None:
            return ""
        difference = np.abs(pixels.astype(np.float64) - read_by_area(data, image_size))
        means.append(difference.mean())
        greatest = max(greatest, difference.max())
    return f"{np.mean(means):>11.3f}{greatest:>7.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.decode")
    parser.add_argument("--source", type=Path, help="a folder of DICOM files, square and 8 bits")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--files", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # pydicom's, of values that bend the standard
    cv2.setNumThreads(1)
    with threadpool_limits(1), find_files(options.source, options.files) as paths:
        if not paths:
            print(f"error: no .dcm file under {options.source}", file=sys.stderr)
            return 2
        files = [path.read_bytes() for path in paths]
        rows = measure(files, options.image_size, options.rounds)
        rows += measure_pictures(files, options.image_size, options.rounds)
    print(f"{len(files)} files, {options.image_size} px, {options.rounds} rounds, one thread")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
