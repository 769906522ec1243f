"""What every reader of raster files offers, and the errors that all of them raise.

A reader gives windows of float32 with NaN where nothing was measured. A band's own nodata value,
its mask, its alpha band or its fill value become NaN band by band, so that a missing value in one
band leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window
from warehouse.errors import SourceError

__all__ = ["Band", "RasterSource", "missing_at", "no_band", "no_crs", "unreadable"]

Band = int | str
"""Number of a band, from 1, or the name of a variable."""


class RasterSource(Protocol):
    """One raster file.

    Attributes
    ----------
    grid
        The file's own grid.
    steps
        Number of dates, or None where the file has no time axis.
    times
        The dates of the time axis, datetime64[s]; None where the file has no time axis, and where
        its dates are in a side file, as those of a .npy.
    """

    grid: Grid
    steps: int | None
    times: NDArray[np.datetime64] | None

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """Read a window of some bands.

        Parameters
        ----------
        step
            Position along the time axis, or None where there is none.

        Returns
        -------
        list
            For each band float32 [rows, columns], NaN where missing.

        Raises
        ------
        SourceError
            For a file that cannot be read there.
        """

    def declares_nan(self, band: Band) -> bool:
        """Return whether the file itself says that some values of a band are missing."""

    def check(self, band: Band) -> None:
        """Raise SourceError for a band that is not there."""


def missing_at(values: NDArray[np.generic], nodata: float | None) -> NDArray[np.float32]:
    """Return a copy as float32 that is NaN where `values` equals `nodata`."""
    plane = values.astype(np.float32)
    if nodata is not None and not np.isnan(nodata):
        # Compared before the conversion: float32 rounds values near a large nodata onto it.
        plane[values == nodata] = np.nan
    return plane


def unreadable(path: Path, error: Exception) -> SourceError:
    """Return the error of a file that its library cannot open or read."""
    return SourceError(
        "a raster cannot be read",
        where=path,
        # xarray lists every installed engine in its message.
        found=f"{type(error).__name__}: {error}"[:200],
        remedy="copy the file again, or leave it out of the feature's files",
    )


def no_crs(path: Path) -> SourceError:
    """Return the error of a file that does not say where on Earth it lies."""
    return SourceError(
        "a raster has no CRS",
        where=path,
        remedy="write it into the file: rio edit-info --crs EPSG:32633 FILE",
    )


def no_band(path: Path, band: Band, known: Sequence[Band]) -> SourceError:
    """Return the error of a band that the settings ask for and the file has not."""
    return SourceError(
        f"a raster has no band {band!r}",
        where=path,
        expected=f"one of {', '.join(map(str, known))}",
        remedy="correct the feature's band",
    )
