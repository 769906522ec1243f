"""Draw a contact sheet of the images of a split, with their boxes.

The samples are spread evenly over the split and read through the loader's own reader, so that the
sheet shows what training sees: letterboxed, in stored order, with the boxes that were kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from warehouse.format.schema import IGNORED
from warehouse.read.chunks import ChunkReader
from warehouse.read.memory import read_samples
from warehouse.read.version import Split

__all__ = ["contact_sheet"]

PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#bfef45",
    "#fabed4",
    "#469990",
    "#dcbeff",
    "#9a6324",
)
BACKGROUND, INK = "#202124", "#e8eaed"


def contact_sheet(split: Split, pictures: int = 24, *, tile: int = 256) -> Image.Image:
    """Draw evenly spread samples with their boxes and class names.

    Parameters
    ----------
    split
        The split to show.
    pictures
        The number of samples, at most.
    tile
        The length of the longer side of each image on the sheet, in pixels.

    Returns
    -------
    PIL.Image.Image
        RGB. Boxes that are ignored in training (crowds, difficult objects) are grey.
    """
    # Not the first samples: of a version in source order they may all be of one class.
    chosen = np.unique(np.linspace(0, len(split) - 1, min(pictures, len(split))).astype(int))

    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    height, width = split.specs["image"].shape[2:]
    scale = tile / max(height, width)
    cell_w, cell_h = round(width * scale) + 8, round(height * scale) + 22
    names = split.class_names

    sheet = Image.new(
        "RGB", (columns * cell_w + 8, rows * cell_h + 30 + 18 * bool(names)), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    step = max(1, len(split) // len(chosen))
    title = f"{split.warehouse.version} / {split.name}: {len(split)} pictures, every {step}th"
    draw.text((10, 8), title, fill=INK)

    # The legend has one line: there is no room for more than twelve names.
    for at, name in enumerate(names[:12]):
        draw.rectangle((10 + at * 110, 27, 17 + at * 110, 34), fill=PALETTE[at % len(PALETTE)])
        draw.text((22 + at * 110, 25), name[:14], fill=INK)

    # Few open files: evenly spread samples seldom share a stored chunk.
    reader = split.reader(keep=4)
    for at, index in enumerate(chosen.tolist()):
        left, top = 8 + at % columns * cell_w, 30 + 18 * bool(names) + at // columns * cell_h
        picture, boxes, labels, flags = _sample(reader, index)
        tile_picture = Image.fromarray(picture).resize((cell_w - 8, cell_h - 22))
        _draw_boxes(tile_picture, boxes, labels, flags)
        sheet.paste(tile_picture, (left, top))
        draw.text((left, top + cell_h - 20), f"#{index}  {len(boxes)} boxes", fill=INK)
    reader.close()

    return sheet


def _sample(
    reader: ChunkReader, index: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the image of a sample (uint8 HWC), its boxes (xyxy in [0, 1]), labels and flags."""
    names = ["image", "box_mask", "box", "label", "box_flags"]
    picture, mask, *rest = (
        array[0] for array in read_samples(reader, names, np.array([index])).values()
    )
    # Stores of float16 and float32 hold values in [0, 1].
    if picture.dtype != np.uint8:
        picture = (picture.astype(np.float32) * 255).round().astype(np.uint8)

    # Box slots that are not used hold zeros, which would be drawn as dots in the corner.
    boxes, labels, flags = (array[mask] for array in rest)

    return np.ascontiguousarray(picture.transpose(1, 2, 0)), boxes, labels, flags


def _draw_boxes(
    picture: Image.Image, boxes: NDArray[Any], labels: NDArray[Any], flags: NDArray[Any]
) -> None:
    draw = ImageDraw.Draw(picture)
    for box, label, flag in zip(boxes, labels.tolist(), flags.tolist(), strict=True):
        x0, y0, x1, y1 = (
            box * [picture.width, picture.height, picture.width, picture.height]
        ).tolist()
        colour = "#9aa0a6" if flag & IGNORED else PALETTE[max(label, 0) % len(PALETTE)]
        # Pillow's rectangles include their last pixel, and must not end before they begin.
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
