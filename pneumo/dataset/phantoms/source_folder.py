"""A folder of phantom chest X-rays in the layout of one of the public data sets.

No data comes from a patient. `synthetic.json` describes the folder; it is written first, and again
when the folder is complete, with the total size of the images.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
from tqdm import tqdm

from pneumo.dataset.phantoms import MARKER
from pneumo.dataset.phantoms.drawing import render_study
from pneumo.dataset.phantoms.layouts import KAGGLE, PHANTOM_LAYOUTS, PhantomLayout
from pneumo.dataset.phantoms.population import PhantomStudy, draw_population
from pneumo.errors import SourceError
from pneumo.images.boxes import Box

_VERSION = 2  # of the images: a folder of another version is not reused


def write_phantoms(
    out: Path,
    *,
    num_studies: int,
    seed: int,
    num_processes: int | None = 1,
    layout: PhantomLayout = KAGGLE,
) -> bool:
    """Write a folder of phantoms; returns False where the complete folder was there already.

    The files are the same, to the byte, for any number of processes (None: one per CPU where there
    is enough work); a script that asks for several needs `if __name__ == "__main__":`. A folder of
    an interrupted call is written again. Raises SourceError for a folder with other content or that
    cannot be written, ValueError as `draw_population`.

    >>> pneumo.write_phantoms(Path("phantoms"), num_studies=120, seed=1)
    """
    studies = draw_population(num_studies, seed)
    content: dict[str, int | str] = {"version": _VERSION, "num_studies": num_studies, "seed": seed}
    if layout is not KAGGLE:
        content["layout"] = layout.name
    try:
        if _is_complete(out, content, studies, layout):
            return False
        for folder in {(out / layout.path_of(study)).parent for study in studies}:
            folder.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(json.dumps(content))
        sizes, boxes = zip(*_write_images(out, studies, num_processes, layout), strict=True)
        layout.write_tables(out, studies, boxes)
        (out / MARKER).write_text(json.dumps({**content, "num_image_bytes": sum(sizes)}))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SourceError(f"--out {out}: {reason}; choose a folder that can be written") from error
    return True


def _is_complete(
    out: Path,
    content: dict[str, int | str],
    studies: Sequence[PhantomStudy],
    layout: PhantomLayout,
) -> bool:
    """Whether all files are there. Raises SourceError for a folder with other content."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / MARKER).read_text())
    except (FileNotFoundError, ValueError):
        found = {}
    expected = {**content, "layout": layout.name}
    if {name: {"layout": KAGGLE.name, **found}.get(name) for name in expected} != expected:
        raise SourceError(
            f"--out {out}: got {found or 'other files'}, expected phantoms of {expected}; choose "
            "another folder, or delete this one"
        )
    tables = [out / name for name in layout.tables]
    images = [out / layout.path_of(study) for study in studies]
    if not all(path.is_file() for path in (*tables, *images)):
        return False
    return bool(found.get("num_image_bytes") == sum(path.stat().st_size for path in images))


def _write_images(
    out: Path, studies: Sequence[PhantomStudy], num_processes: int | None, layout: PhantomLayout
) -> list[tuple[int, tuple[Box, ...]]]:
    """Bytes and boxes of each image."""
    if num_processes is None:  # starting a process costs as much as ten studies
        num_processes = min(os.cpu_count() or 1, 1 + len(studies) // 32)
    write = partial(_write_image, out, layout.name)
    every_s = 0.1 if sys.stderr.isatty() else 10
    show = partial(tqdm, desc="phantoms", total=len(studies), delay=5, mininterval=every_s)
    if num_processes == 1:
        return list(show(map(write, studies)))
    # Spawned, not forked: the caller may have threads, of torch for instance.
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, signal.signal, ignore_interrupts)
    try:
        return list(show(pool.map(write, studies, chunksize=4)))
    finally:
        pool.shutdown(cancel_futures=True)


def _write_image(out: Path, layout_name: str, study: PhantomStudy) -> tuple[int, tuple[Box, ...]]:
    cv2.setNumThreads(1)
    layout = PHANTOM_LAYOUTS[layout_name]  # by name, as its functions cannot be pickled
    pixels, boxes = render_study(study)
    content = layout.encode(study, pixels)
    (out / layout.path_of(study)).write_bytes(content)
    return len(content), boxes
