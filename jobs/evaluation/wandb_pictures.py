"""The pictures that W&B gets of an evaluation, as a Parquet table in `<run>/tracking/`."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.evaluation.result_files import Results
from pneumo.reporting.figures import case_pictures, data_charts, style
from pneumo.reporting.figures.case_pictures import Case, shrink
from pneumo.reporting.tracking.media import Gallery, Media, Picture, Scalar, Table

STUDIES = "eval/predictions"
_COLUMNS = ("outcome", "label", "probability", "threshold", "finding", "view", "age band", "boxes",
            "drawn of")  # fmt: skip


_SCHEMA = pa.schema(
    {
        "key": pa.string(),  # under which W&B shows it
        "caption": pa.string(),
        "picture": pa.binary(),
        "boxes": pa.list_(pa.list_(pa.float64())),
        "map": pa.binary(),
        "cells": pa.string(),  # of the table of studies, the other cells as JSON
    }
)


def list_pictures(results: Results) -> pa.Table:
    """A row of _SCHEMA for each picture that W&B shows."""
    pictures, n = results.pictures, results.evaluation.test.n
    rows = [
        _describe("data/contact", Picture(data_charts.draw_contact_sheet(sheet), sheet.caption))
        for sheet in results.data.contact
    ]
    if pictures.grid:
        title = f"Predictions: {len(pictures.grid)} of {n} test studies"
        grid = case_pictures.draw_prediction_grid(pictures.grid, title=title)
        rows.append(_describe("eval/prediction_grid", Picture(grid, title)))
    for kind, groups in (("gallery", pictures.gallery), ("errors", pictures.errors)):
        for outcome, cases in groups.items():
            rows += [_describe(f"eval/{kind}/{outcome}", show_case(case)) for case in cases]
    for case in pictures.sample:
        thumbnail = show_case(shrink(case, data_charts.CONTACT_PIXELS))
        rows.append(_describe(STUDIES, thumbnail, json.dumps(_list_cells(case))))
    return pa.Table.from_pylist(rows, _SCHEMA)


def _describe(key: str, picture: Picture, cells: str | None = None) -> dict[str, Any]:
    return {
        "key": key,
        "caption": picture.caption,
        "picture": picture.data,
        "boxes": [list(box) for box in picture.boxes],
        "map": picture.map_levels,
        "cells": cells,
    }


def show_case(case: Case) -> Picture:
    """The study with the readers' boxes and the network's map as overlays."""
    levels = None
    if case.cam is not None:
        rows, columns = (
            (np.arange(shown) * given // shown)
            for shown, given in zip(case.image.shape, case.cam.shape, strict=True)
        )
        cam = case.cam[np.ix_(rows, columns)]
        levels = style.encode_image(np.digitize(cam, [0.25, 0.5, 0.75]).astype(np.uint8), "png")
    caption = f"{case.outcome.upper()}  {case.caption}"
    return Picture(style.encode_image(case.image), caption, case.boxes, levels)


def _list_cells(case: Case) -> list[Scalar]:
    """The cells of _COLUMNS. A row stands for 1 / (rows of its outcome and view) of the studies in
    `drawn of`."""
    return [
        *(case.outcome, case.target, case.probability, case.threshold),
        *(case.finding, case.view or None, case.age_band or None),
        *(len(case.boxes), case.stratum_size),
    ]


def read_pictures(data: bytes) -> dict[str, Media]:
    """The galleries by key, and the table of studies with thumbnails."""
    galleries: dict[str, list[Picture]] = {}
    studies: list[list[Picture | Scalar]] = []
    for row in pq.read_table(io.BytesIO(data)).to_pylist():
        boxes = [tuple(box) for box in row["boxes"]]
        picture = Picture(row["picture"], row["caption"], boxes, row["map"])
        if row["key"] == STUDIES:
            studies.append([picture, *json.loads(row["cells"])])
        else:
            galleries.setdefault(row["key"], []).append(picture)
    shown: dict[str, Media] = {key: Gallery(found) for key, found in galleries.items()}
    return shown | ({STUDIES: Table(["picture", *_COLUMNS], studies)} if studies else {})
