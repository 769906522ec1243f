"""NumPy arrays on disk (.npy) as rasters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window, read_extent
from ingest.rasters.readers.source import Band, no_band, unreadable
from warehouse.errors import SourceError

__all__ = ["NumpySource"]


class NumpySource:
    """A .npy of shape [time, y, x, band], [y, x, band] or [y, x].

    A GeoJSON rectangle says where it lies, and a side file says which dates it has.
    """

    times: NDArray[np.datetime64] | None = None

    def __init__(self, path: Path, extent: Path | None) -> None:
        if extent is None:
            raise SourceError(
                "a .npy does not say where it lies",
                where=path,
                remedy="give raster.grid.geojson, or the feature's extent",
            )
        self.path = path
        # A pickle in an array of objects would run code, whoever made the file.
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        if data.dtype.kind not in "biuf" or data.ndim not in {2, 3, 4}:
            raise SourceError(
                "a .npy is no raster",
                where=path,
                expected="numbers [time, y, x, band] or [y, x, band]",
                found=f"{data.dtype} {data.shape}",
            )

        shape = (*data.shape, 1) if data.ndim == 2 else data.shape
        self.bands = int(shape[-1])
        self.steps = int(shape[0]) if len(shape) == 4 else None
        height, width = shape[-3:-1]
        wkt, (left, bottom, right, top) = read_extent(extent)
        self.grid = Grid(
            wkt,
            ((right - left) / width, 0.0, left, 0.0, (bottom - top) / height, top),
            height,
            width,
        )

    def check(self, band: Band) -> None:
        """See `RasterSource.check`."""
        if not isinstance(band, int) or not 1 <= band <= self.bands:
            raise no_band(self.path, band, range(1, self.bands + 1))

    def declares_nan(self, band: Band) -> bool:
        """Return False: a .npy has nowhere to say so."""
        return False

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """See `RasterSource.read`."""
        row, column, rows, columns = window
        # Mapped anew each time: pages of a map that is kept count as this process's memory.
        try:
            data = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(self.path, error) from None
        if data.ndim == 2:
            data = data[:, :, None]
        elif step is not None:
            data = data[step]
        part = data[row : row + rows, column : column + columns]
        return [part[:, :, int(band) - 1].astype(np.float32) for band in bands]
