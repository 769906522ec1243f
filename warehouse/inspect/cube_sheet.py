"""A sheet of a cube: its features over time, and the splits of its blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.features import Feature
from warehouse.read.version import Warehouse
from warehouse.settings import SPLIT_NAMES

__all__ = ["cube_sheet"]

BACKGROUND, INK, MISSING = (32, 33, 36), "#e8eaed", (70, 20, 70)
RAMP = np.array(
    [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]], np.float64
)
CLASSES = np.array(
    [
        [230, 25, 75],
        [60, 180, 75],
        [67, 99, 216],
        [245, 130, 49],
        [145, 30, 180],
        [66, 212, 244],
        [240, 50, 230],
        [191, 239, 69],
        [250, 190, 212],
        [70, 153, 144],
        [220, 190, 255],
        [154, 99, 36],
    ],
    np.uint8,
)
SPLIT_COLOURS = np.array([[95, 99, 104], [66, 133, 244], [251, 188, 4], [32, 33, 36]], np.uint8)
LARGEST_SIDE = 2048


def cube_sheet(warehouse: Warehouse, pictures: int = 24, *, tile: int = 256) -> Image.Image:
    """A PIL picture: features down, dates across (spread evenly), each feature in one colour scale;
    last, the split of every block.

    pictures: tiles at most. Large cubes are shown every n-th row and column. Memory: one date,
    thinned.
    """
    assert isinstance(warehouse.layout, Cube)
    cube = warehouse.layout.geometry
    rows = len(cube.features)
    times, height, width, _ = cube.shape
    dates = np.unique(
        np.linspace(0, times - 1, max(1, min(times, 8, pictures // rows))).astype(int)
    )
    step = max(1, -(-max(height, width) // LARGEST_SIDE))
    scale = tile / max(height, width)
    tile_h, tile_w = max(1, round(height * scale)), max(1, round(width * scale))
    sheet = Image.new(
        "RGB", (8 + len(dates) * (tile_w + 8), 30 + rows * (tile_h + 22) + tile_h + 30), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (10, 8), f"{warehouse.version}: {rows} features, {len(dates)} of {times} dates", fill=INK
    )
    data = warehouse.split(warehouse.splits[0]).array("data")
    for column, date in enumerate(dates.tolist()):
        values = data[date, ::step, ::step, :]
        for row, feature in enumerate(cube.features):
            place = (8 + column * (tile_w + 8), 30 + row * (tile_h + 22))
            sheet.paste(
                Image.fromarray(coloured(values[..., row], feature)).resize((tile_w, tile_h)), place
            )
            draw.text(
                (place[0], place[1] + tile_h + 2),
                f"{feature.name}  {cube.times[date][:10]}",
                fill=INK,
            )
    labels = cube.layout.inner_labels(warehouse.cube_table("split"))[0]
    top = 30 + rows * (tile_h + 22)
    blocks = Image.fromarray(SPLIT_COLOURS[labels]).resize(
        (tile_w, tile_h), Image.Resampling.NEAREST
    )
    sheet.paste(blocks, (8, top))
    for at, name in enumerate((*SPLIT_NAMES, "left out")):
        draw.rectangle(
            (tile_w + 20, top + 4 + 18 * at, tile_w + 32, top + 16 + 18 * at),
            fill=tuple(SPLIT_COLOURS[at].tolist()),
            outline=INK,
        )
        draw.text((tile_w + 38, top + 3 + 18 * at), name, fill=INK)
    return sheet


def coloured(values: NDArray[np.float32], feature: Feature) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: a ramp over mean ± 2 std (canopy.

    0 to maximum), a colour a code, dark violet where missing.
    """
    missing = np.isnan(values)
    if feature.kind == "categorical":
        order = np.searchsorted(
            np.sort(feature.codes), np.where(missing, min(feature.codes), values)
        )
        picture = CLASSES[order % len(CLASSES)]
    else:
        mean, std = feature.mean or 0.0, feature.std or 1.0
        low, high = (
            (0.0, feature.maximum or 1.0)
            if feature.kind == "canopy"
            else (mean - 2 * std, mean + 2 * std)
        )
        place = np.clip((np.nan_to_num(values) - low) / max(high - low, 1e-12), 0, 1) * (
            len(RAMP) - 1
        )
        picture = np.stack(
            [np.interp(place, np.arange(len(RAMP)), RAMP[:, band]) for band in range(3)], axis=-1
        ).astype(np.uint8)
    picture = picture.copy()
    picture[missing] = MISSING
    return picture
