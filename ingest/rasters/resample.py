"""Warping: a window of a raster onto a window of the cube's grid.

GDAL warps band by band with an exact transform, so that a voxel is valid where the source pixel
below its centre is, and no value depends on how the cube is cut.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window

__all__ = ["Plane", "warp"]

Plane = NDArray[np.float32]
"""float32 [rows, columns], NaN where nothing was measured."""


def warp(
    plane: Plane, source: Grid, part: Window, target: Grid, window: Window, method: str
) -> Plane:
    """Resample a window of a source onto a window of a grid.

    Parameters
    ----------
    plane
        Values of the window `part` of the source.
    source, target
        The grids of the source and of the result.
    part
        Where `plane` lies in the source.
    window
        Where the result lies in the target.
    method
        Name of a resampling method of GDAL, such as `bilinear`.

    Returns
    -------
    NDArray
        float32 [rows, columns] of the window; NaN outside the source, and where the source pixel
        below a centre is missing.
    """
    from rasterio.warp import Resampling, reproject

    if source.transform == target.transform and source.crs == target.crs:
        # On the same grid a slice is exact, and much faster than GDAL.
        row, column = window[0] - part[0], window[1] - part[1]
        last_row, last_column = row + window[2], column + window[3]
        if min(row, column) >= 0 and last_row <= part[2] and last_column <= part[3]:
            return plane[row:last_row, column:last_column]

    out = np.full((window[2], window[3]), np.nan, np.float32)
    reproject(
        plane,
        out,
        src_transform=source.snapped(target).at(part),
        src_crs=source.crs,
        dst_transform=target.at(window),
        dst_crs=target.crs,
        src_nodata=np.nan,
        dst_nodata=np.nan,
        resampling=Resampling[method],
        # GDAL's default approximates the transform to an eighth of a pixel, which depends on the
        # window and so on how the cube is cut.
        tolerance=0.0,
    )
    return out
