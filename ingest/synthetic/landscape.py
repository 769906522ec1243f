"""A small synthetic landscape over time as GeoTIFFs: terrain, land cover, canopy height, clouds.

It has what a cube build needs and what a compressor should keep: smooth slopes, sharp borders,
phases of vegetation that differ by class, a clearing that grows, gaps (clouds over all bands,
specks in NIR alone), and origins shifted by part of a pixel. Date i follows from (seed, i) and the
landscape of the seed. `raster.yaml` beside the files holds the settings to build it. Given up:
physics.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COVER_CODES", "write_landscape"]

COVER_CODES = (1, 2, 5, 8)
"""water, field, meadow, forest."""
PIXEL_M = 10.0
ORIGIN = (500_000.0, 5_200_000.0)
FIRST_DAY = dt.date(2018, 1, 5)
SETTINGS = """# Made by make_sample: python -m scripts.build_zarr --config {root}/raster.yaml
build:
  input_root: {root}
  format: raster
raster:
  grid: {{like: terrain.tif}}
  time: {{pattern: 'scene_(?P<date>\\d{{8}})'}}
  features:
    - {{name: red, files: scenes/*.tif, band: 1}}
    - {{name: green, files: scenes/*.tif, band: 2}}
    - {{name: blue, files: scenes/*.tif, band: 3}}
    - {{name: nir, files: scenes/*.tif, band: 4}}
    - {{name: ndvi, index: ndvi, red: red, nir: nir}}
    - {{name: cover, files: cover.tif, kind: categorical, codes: {codes}, static: true}}
    - {{name: height, files: height.tif, kind: canopy, static: true, units: m}}
  empty_dates: keep
"""


def write_landscape(
    output: Path,
    dates: int,
    size: tuple[int, int],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `scenes/scene_<date>.tif`, `terrain.tif`, `cover.tif`, `height.tif`, `raster.yaml`.

    A scene has the bands red, green, blue and near infrared, uint8, in which 0 means missing.

    Parameters
    ----------
    dates
        Number of scenes.
    size
        Height and width in pixels.
    progress
        Called with numbers of dates that are done.
    """
    # A generator for each layer, so that a change to one of them leaves the others as they were.
    terrain = _smooth(np.random.default_rng([seed, 1]), size, 5)
    wet = _smooth(np.random.default_rng([seed, 2]), size, 6)
    cover = np.select(
        [terrain < -1.1, wet < -0.3, terrain + wet < 0.7], COVER_CODES[:3], COVER_CODES[3]
    )
    rough = _smooth(np.random.default_rng([seed, 3]), size, 60)
    height = np.where(cover == COVER_CODES[3], np.clip(18 + 6 * rough, 2, 40), 0).astype(np.float32)
    _write(output / "terrain.tif", (300 + 80 * terrain)[None].astype(np.float32), (0, 0), None)
    _write(output / "cover.tif", cover[None].astype(np.uint8), (0, 0), None)
    _write(output / "height.tif", height[None], (0, 0), None)
    for number in range(dates):
        # Not evenly spaced, as satellite series are not.
        day = FIRST_DAY + dt.timedelta(days=23 * number + number % 5)
        rng = np.random.default_rng([seed, 100 + number])
        # Metres, less than half a pixel: scenes must be resampled onto the grid of the terrain.
        shift = tuple((rng.integers(-3, 4, 2)).tolist())
        _write(
            output / "scenes" / f"scene_{day:%Y%m%d}.tif",
            _scene(rng, day, number / max(1, dates - 1), terrain, cover, rough),
            shift,
            0,
        )
        if progress is not None:
            progress(1)
    codes = list(COVER_CODES)
    (output / "raster.yaml").write_text(SETTINGS.format(root=output.as_posix(), codes=codes))


def _smooth(rng: np.random.Generator, size: tuple[int, int], cells: int) -> NDArray[np.float64]:
    """Return noise of zero mean and unit deviation.

    Its largest hills span 1 / `cells` of the longer side; two octaves of half the size and half the
    strength lie on top.
    """
    import cv2

    out = np.zeros(size)
    longest = max(size)
    for octave in range(3):
        count = cells << octave
        rows, columns = (max(2, count * side // longest) for side in size)
        low = rng.standard_normal((rows, columns))
        out += cv2.resize(low, size[::-1], interpolation=cv2.INTER_CUBIC) / (1 << octave)
    normalised: NDArray[np.float64] = (out - out.mean()) / out.std()
    return normalised


def _scene(
    rng: np.random.Generator,
    day: dt.date,
    share: float,
    terrain: NDArray[Any],
    cover: NDArray[Any],
    rough: NDArray[Any],
) -> NDArray[np.uint8]:
    """Draw one date, uint8 [4, H, W].

    Parameters
    ----------
    share
        How far the series has come, 0 to 1; the clearing grows with it.
    terrain, rough
        Noise, float64 [H, W].
    cover
        Codes of the land cover, [H, W].
    """
    # Greenest about the tenth of July, as in the temperate north.
    season = np.sin(2 * np.pi * (day.timetuple().tm_yday - 100) / 365)
    green = np.select(
        [cover == 1, cover == 2, cover == 5],
        [0.02, 0.35 + 0.35 * season, 0.5 + 0.15 * season],
        0.65 + 0.1 * season,
    )
    cleared = (cover == COVER_CODES[3]) & (terrain < -0.2 + 1.2 * share) & (rough > 0.4)
    green = np.where(cleared, 0.15, green) + 0.03 * rough
    shade = 1 + 0.12 * np.gradient(terrain, axis=1) * 20
    # Plants are dark in the visible bands, red most of all, and bright in the near infrared.
    colours = [120 - 85 * green, 105 - 45 * green, 95 - 55 * green, 60 + 160 * green]
    bands = np.stack(colours) * shade
    noisy = bands + rng.normal(0, 2, bands.shape)
    # From 1: the value 0 means missing.
    picture: NDArray[np.uint8] = np.clip(noisy, 1, 255).astype(np.uint8)
    clouds = _smooth(rng, terrain.shape, 3) > rng.uniform(0.3, 2.4)
    picture[:, clouds] = 0
    # Gaps in one band alone show that `valid` is kept for each feature.
    picture[3][rng.random(terrain.shape) < 0.002] = 0
    return picture


def _write(path: Path, bands: NDArray[Any], shift: tuple[int, ...], nodata: float | None) -> None:
    import rasterio
    from affine import Affine

    path.parent.mkdir(parents=True, exist_ok=True)
    transform = Affine(PIXEL_M, 0, ORIGIN[0] + shift[0], 0, -PIXEL_M, ORIGIN[1] + shift[1])
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=bands.shape[0],
        height=bands.shape[1],
        width=bands.shape[2],
        dtype=bands.dtype,
        crs="EPSG:32633",
        transform=transform,
        nodata=nodata,
        compress="deflate",
        tiled=True,
        blockxsize=256,
        blockysize=256,
    ) as file:
        file.write(bands)
