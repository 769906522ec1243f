"""python -m benchmarks.large_picture FOLDER [SIDE]

A grey picture of SIDE x SIDE (20,000) with its mask, discs under noise, as tiled TIFFs written by
bands: for `segment_patches`, whose memory is to be shown. Band i follows from (seed, i) alone.
Memory: a band of 256 lines.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

__all__ = ["write_large_picture"]

BAND = 256
AREA_PER_DISC = 180**2


def write_large_picture(folder: Path, side: int, seed: int = 0) -> None:
    """<folder>/images/large.tif and masks/large.tif, 255 on discs of radius 12 to 60."""
    rng = np.random.default_rng(seed)
    count = side * side // AREA_PER_DISC
    ys, xs, radii = (
        rng.uniform(0, side, count),
        rng.uniform(0, side, count),
        rng.uniform(12, 60, count),
    )
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "driver": "GTiff",
        "width": side,
        "height": side,
        "count": 1,
        "dtype": "uint8",
        "tiled": True,
        "blockxsize": BAND,
        "blockysize": BAND,
        "compress": "deflate",
        "zlevel": 1,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with (
            rasterio.open(folder / "images/large.tif", "w", **options) as picture,
            rasterio.open(folder / "masks/large.tif", "w", **options) as truth,
        ):
            for top in range(0, side, BAND):
                height = min(BAND, side - top)
                mask = np.zeros((height, side), np.uint8)
                for at in np.flatnonzero((ys + radii >= top) & (ys - radii <= top + height)):
                    left, right = (
                        max(0, int(xs[at] - radii[at])),
                        min(side, int(xs[at] + radii[at]) + 2),
                    )
                    y, x = np.ogrid[top : top + height, left:right]
                    mask[:, left:right] |= (
                        (y - ys[at]) ** 2 + (x - xs[at]) ** 2 <= radii[at] ** 2
                    ).astype(np.uint8)
                noise = np.random.default_rng((seed, top)).integers(
                    60, 120, (height, side), np.uint8
                )
                picture.write(noise + mask * np.uint8(70), 1, window=Window(0, top, side, height))
                truth.write(mask * np.uint8(255), 1, window=Window(0, top, side, height))


if __name__ == "__main__":
    write_large_picture(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
