"""Digests of what the documentation promises to be the same on every processor.

    python -m tests.promised_results FOLDER     one JSON object: what -> digest

`tests.processors` runs this as if on several processors and compares the digests. FOLDER is made
once, by `write_inputs`, so that all of them read the same bytes.
"""

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import UID

from pneumo.config import Config
from pneumo.config_layers import override
from pneumo.dataset.phantoms.source_folder import write_phantoms
from pneumo.dataset.preparation import find_store, finish_store
from pneumo.dataset.shard_plans import digest_settings, plan_shards
from pneumo.dataset.shard_tasks import prepare_shard
from pneumo.dataset.sources.recognition import read_source
from pneumo.dataset.splits import choose_salt, split_studies
from pneumo.errors import DicomError
from pneumo.images.dicom import decode_gray
from pneumo.images.gray_levels import apply_window
from pneumo.images.letterbox import letterbox
from pneumo.loading.augmentation import draw_uniforms
from pneumo.loading.sample_order import epoch_order

ENVIRON = {"PNEUMO_HASH_KEY": "a secret of the tests"}
CONFIG = override(Config(), {"prepare.image_size": 56})
SHAPES = ((1024, 1024), (1280, 1024), (2048, 1777), (448, 448), (300, 200), (40, 50))
"""Resampled to 224: by repeating weights, with a border, in general, by an integer, enlarged."""


def write_inputs(folder: Path) -> None:
    """Phantoms; they are drawn with floats, so other processors may draw other pictures."""
    write_phantoms(folder, num_studies=32, seed=1)


def digest(*parts: bytes) -> str:
    """The digest of the parts, concatenated."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def store(source_folder: Path) -> str:
    """Every file of a store: shards, tables, manifest."""
    source = read_source(str(source_folder), ENVIRON)
    split = split_studies(source.studies, CONFIG.split, seed=CONFIG.seed, has_patients=True)
    with tempfile.TemporaryDirectory() as folder:
        assert find_store(folder, source, CONFIG) is None
        parts = [
            prepare_shard(plan, folder, 56, digest_settings(CONFIG), source.file_key)
            for plan in plan_shards(
                source.studies, split.by_key, seed=CONFIG.seed, samples_per_shard=8
            )
        ]
        finish_store(folder, source, parts, split.audit, CONFIG)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return digest(
            *(path.relative_to(folder).as_posix().encode() for path in files),
            *(path.read_bytes() for path in files),
        )


def splits(source_folder: Path) -> str:
    """The salts chosen for several seeds, and the split of each study."""
    source = read_source(str(source_folder), ENVIRON)
    places = {
        seed: (
            choose_salt(source.studies, CONFIG.split, seed=seed),
            split_studies(source.studies, CONFIG.split, seed=seed, has_patients=True).by_key,
        )
        for seed in range(4)
    }
    return digest(json.dumps(places, sort_keys=True).encode())


def pictures() -> Iterator[tuple[str, str]]:
    """For each transfer syntax the pictures of pydicom's test files, in gray and resampled."""
    found: dict[str, list[bytes]] = {}
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm")):
        if path.stat().st_size > 2**20:
            continue
        try:
            dataset = pydicom.dcmread(path)
            gray = decode_gray(dataset)
        except (DicomError, pydicom.errors.InvalidDicomError, AttributeError):
            continue
        syntax = UID(dataset.file_meta.TransferSyntaxUID).keyword
        found.setdefault(syntax, []).extend((gray.tobytes(), letterbox(gray, 64)[0].tobytes()))
    for syntax, parts in sorted(found.items()):
        yield f"pixels of {syntax}", digest(*parts)


def resampling(shape: tuple[int, int]) -> str:
    image = np.random.Generator(np.random.PCG64(7)).integers(0, 256, shape, np.uint8)
    return digest(letterbox(image, 224)[0].tobytes())


def palette() -> str:
    """Gray levels of colours, of which one in a thousand lies between two levels."""
    colours = np.random.Generator(np.random.PCG64(8)).integers(0, 256, (3, 2**16), np.uint8)
    levels = []
    for start in range(0, 2**16, 256):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "PALETTE COLOR"
        dataset.Rows = dataset.Columns = 16
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = bytes(range(256))
        for name, table in zip(("Red", "Green", "Blue"), colours, strict=True):
            setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 8])
            part = table[start : start + 256].tobytes()
            setattr(dataset, f"{name}PaletteColorLookupTableData", part)
        levels.append(decode_gray(dataset).tobytes())
    return digest(*levels)


def windows() -> str:
    """Gray levels of stored values of 16 bits under windows of each kind."""
    values = np.arange(2**16, dtype=np.float64)
    levels = [
        np.rint(apply_window(values, center, width, function) * 255).astype(np.uint8).tobytes()
        for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")
        for center, width in ((600.0, 1600.0), (2048.5, 4095.0), (31000.25, 50000.0))
    ]
    return digest(*levels)


def orders() -> str:
    sizes = [64] * 40 + [17, 64, 3]
    return digest(
        *(
            epoch_order(sizes, batch_size=batch, seed=seed, epoch=epoch).astype("<i8").tobytes()
            for batch, seed, epoch in ((64, 0, 1), (30, 0, 2), (256, 5, 1))
        )
    )


def augmentation_draws() -> str:
    """The uniform draws of each study."""
    keys = [f"{number:020x}" for number in range(2000)]
    uniforms = draw_uniforms(keys, seed=3, epoch=2, count=4)
    return digest(uniforms.astype("<f8").tobytes())


def compute(source_folder: Path) -> dict[str, str]:
    """What is promised -> digest."""
    whole: dict[str, Callable[[], str]] = {
        "bytes of a store": partial(store, source_folder),
        "splits": partial(splits, source_folder),
        "order of epochs": orders,
        "draws of augmentation": augmentation_draws,
        "gray of palettes": palette,
        "gray of windows": windows,
        **{f"resampling of {a} x {b}": partial(resampling, (a, b)) for a, b in SHAPES},
    }
    return {name: function() for name, function in whole.items()} | dict(pictures())


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # pydicom's, of its own damaged files
    print(json.dumps(compute(Path(sys.argv[1]))))
