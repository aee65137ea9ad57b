"""Media and artifacts as wandb's objects. Imports wandb only when called: it takes 0.7 s, and may
be missing."""

import io
from typing import Any

import numpy as np
from PIL import Image

from pneumo.reporting.tracking.media import (
    MAP_LEVELS,
    MAX_IMAGES,
    MAX_ROWS,
    Artifact,
    ConfusionChart,
    Gallery,
    LineChart,
    Media,
    Page,
    Picture,
    Table,
)


def to_wandb_media(media: Media) -> Any:
    """What `wandb.Run.log` takes."""
    import wandb

    match media:
        case Gallery(pictures):
            return [_convert_picture(picture) for picture in pictures[:MAX_IMAGES]]
        case Page(html):
            return wandb.Html(html)
        case Table(columns, rows):
            cells = [
                [_convert_picture(cell) if isinstance(cell, Picture) else cell for cell in row]
                for row in rows[:MAX_ROWS]
            ]
            return wandb.Table(columns=list(columns), data=cells)
        case LineChart(title=title, x_label=x_label, y_label=y_label):
            return wandb.plot_table(
                "wandb/area-under-curve/v0",
                wandb.Table(columns=["series", "x", "y"], data=media.rows()[:MAX_ROWS]),
                {"x": "x", "y": "y", "class": "series"},
                {"title": title, "x-axis-title": x_label, "y-axis-title": y_label},
            )
        case ConfusionChart(title=title):
            names = ("Actual", "Predicted", "nPredictions")
            return wandb.plot_table(
                "wandb/confusion_matrix/v1",
                wandb.Table(columns=list(names), data=media.rows()),
                {name: name for name in names},
                {"title": title},
            )


def _convert_picture(picture: Picture) -> Any:
    import wandb

    boxes = [
        {
            "position": {"minX": x, "minY": y, "maxX": x + width, "maxY": y + height},
            "domain": "pixel",
            "class_id": 1,
        }
        for x, y, width, height in picture.boxes
    ]
    masks = None
    if picture.map_levels is not None:
        levels = np.asarray(Image.open(io.BytesIO(picture.map_levels)))
        masks = {"Grad-CAM": {"mask_data": levels, "class_labels": dict(MAP_LEVELS)}}
    overlay = {"boxes": {"box_data": boxes, "class_labels": {1: "reference"}}}
    return wandb.Image(
        Image.open(io.BytesIO(picture.data)),
        caption=picture.caption,
        boxes=overlay if boxes else None,
        masks=masks,
    )


def to_wandb_artifact(artifact: Artifact) -> Any:
    """The artifact as wandb's, with its files written to wandb's staging folder."""
    import wandb

    packed = wandb.Artifact(artifact.name, type=artifact.type, metadata=dict(artifact.metadata))
    for name, content in artifact.files.items():
        with packed.new_file(name, mode="wb") as file:
            file.write(content)
    for name, url in artifact.references.items():
        # The record has the digest; wandb would need the store's credentials to compute one.
        packed.add_reference(url, name=name, checksum=False)
    return packed
