"""Draw a sheet of a cube: its features over time, and the splits of its blocks.

The colours follow from the statistics of the training split that the version stores, so that dates
can be compared with each other. What was given up: detail, since large cubes are thinned before
they are drawn.
"""

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
"""Training, validation, test, and the blocks that were left out."""
LARGEST_SIDE = 2048
"""Rows or columns that are read of a date, at most."""
MARGIN, TOP, CAPTION = 8, 30, 22
"""Pixels between tiles, above the first row, and below each tile for its caption."""


def cube_sheet(warehouse: Warehouse, pictures: int = 24, *, tile: int = 256) -> Image.Image:
    """Draw the features of a cube, one in each row, at evenly spread dates, one in each column.

    Each feature has one colour scale for all dates. The last row shows the split of every block.

    Parameters
    ----------
    warehouse
        A version that holds a cube.
    pictures
        The number of tiles, at most; each feature has at least one.
    tile
        The length of the longer side of each tile, in pixels.

    Returns
    -------
    PIL.Image.Image
        RGB.

    Notes
    -----
    Memory: one date of the cube, thinned.
    """
    assert isinstance(warehouse.layout, Cube)
    cube = warehouse.layout.geometry
    rows = len(cube.features)
    times, height, width, _ = cube.shape
    columns = max(1, min(times, 8, pictures // rows))
    dates = np.unique(np.linspace(0, times - 1, columns).astype(int))

    # Every n-th row and column: resampling would need a whole date in memory, and would mix the
    # codes of categorical features.
    step = max(1, -(-max(height, width) // LARGEST_SIDE))
    scale = tile / max(height, width)
    tile_h, tile_w = max(1, round(height * scale)), max(1, round(width * scale))

    split_top = TOP + rows * (tile_h + CAPTION)
    size = MARGIN + len(dates) * (tile_w + MARGIN), split_top + tile_h + TOP
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    title = f"{warehouse.version}: {rows} features, {len(dates)} of {times} dates"
    draw.text((10, 8), title, fill=INK)

    # All features of a date at once: an inner chunk holds several of them, and would be decoded
    # again for each. All splits share the arrays of the cube, so that any of them gives the whole.
    data = warehouse.split(warehouse.splits[0]).array("data")
    for column, date in enumerate(dates.tolist()):
        values = data[date, ::step, ::step, :]
        left = MARGIN + column * (tile_w + MARGIN)
        for row, feature in enumerate(cube.features):
            top = TOP + row * (tile_h + CAPTION)
            image = Image.fromarray(coloured(values[..., row], feature))
            sheet.paste(image.resize((tile_w, tile_h)), (left, top))
            caption = f"{feature.name}  {cube.times[date][:10]}"
            draw.text((left, top + tile_h + 2), caption, fill=INK)

    labels = cube.layout.inner_labels(warehouse.cube_table("split"))[0]
    _draw_splits(sheet, labels, split_top, (tile_w, tile_h))

    return sheet


def _draw_splits(
    sheet: Image.Image, labels: NDArray[np.uint8], top: int, size: tuple[int, int]
) -> None:
    """Draw the label of each inner chunk (uint8 [y, x]) as a map of `size`, and its legend."""
    # NEAREST: any other filter would invent colours between two splits.
    blocks = Image.fromarray(SPLIT_COLOURS[labels]).resize(size, Image.Resampling.NEAREST)
    sheet.paste(blocks, (MARGIN, top))

    draw = ImageDraw.Draw(sheet)
    left = size[0] + 20
    for label, name in enumerate((*SPLIT_NAMES, "left out")):
        y = top + 18 * label
        colour = tuple(SPLIT_COLOURS[label].tolist())
        draw.rectangle((left, y + 4, left + 12, y + 16), fill=colour, outline=INK)
        draw.text((left + 18, y + 3), name, fill=INK)


def coloured(values: NDArray[np.float32], feature: Feature) -> NDArray[np.uint8]:
    """Return the values of a feature as colours.

    Parameters
    ----------
    values
        float32 ``[H, W]``, NaN where missing.
    feature
        The feature, with its statistics.

    Returns
    -------
    ndarray
        uint8 ``[H, W, 3]``: a ramp over mean ± 2 standard deviations (of a canopy, over 0 to its
        maximum), or a colour for each code. Missing values are dark violet.
    """
    missing = np.isnan(values)
    if feature.kind == "categorical":
        # NaN has no place among the codes; any code will do, since it is painted over below.
        codes = np.where(missing, min(feature.codes), values)
        order = np.searchsorted(np.sort(feature.codes), codes)
        image = CLASSES[order % len(CLASSES)]
    else:
        low, high = _colour_range(feature)
        share = (np.nan_to_num(values) - low) / max(high - low, 1e-12)
        position = np.clip(share, 0, 1) * (len(RAMP) - 1)
        stops = np.arange(len(RAMP))
        bands = [np.interp(position, stops, RAMP[:, band]) for band in range(3)]
        image = np.stack(bands, axis=-1).astype(np.uint8)

    image = image.copy()
    image[missing] = MISSING
    return image


def _colour_range(feature: Feature) -> tuple[float, float]:
    if feature.kind == "canopy":
        return 0.0, feature.maximum or 1.0

    # Not the extremes: single bright pixels would leave the rest of a band dark.
    mean, std = feature.mean or 0.0, feature.std or 1.0
    return mean - 2 * std, mean + 2 * std
