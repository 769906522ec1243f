"""Opening a raster file by its extension.

A source is opened once in a process, since the last few are kept, and read by window, never as a
whole: the memory needed is that of the windows asked for.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ingest.rasters.readers.gdal_file import GdalSource
from ingest.rasters.readers.numpy_file import NumpySource
from ingest.rasters.readers.source import RasterSource, unreadable
from ingest.rasters.readers.xarray_file import XarraySource
from ingest.rasters.settings import RASTER_SUFFIXES
from warehouse.errors import WarehouseError

__all__ = ["open_raster"]

OPEN_AT_ONCE = 32
"""Sources kept open: a cube of many dates must not reach the limit of open files."""


def open_raster(path: Path, extent: Path | None = None) -> RasterSource:
    """Open a raster, or return it where it is open already.

    Parameters
    ----------
    path
        The file; its extension decides which library reads it.
    extent
        File with the GeoJSON rectangle that a .npy covers.

    Raises
    ------
    SourceError
        For a file that is unreadable or truncated, or has no CRS.
    """
    try:
        info = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return _open(path, extent, (info.st_size, info.st_mtime_ns))


@lru_cache(maxsize=OPEN_AT_ONCE)
def _open(path: Path, extent: Path | None, stamp: tuple[int, int]) -> RasterSource:
    # A file that was replaced while the process runs has another stamp, and is opened again.
    kind = RASTER_SUFFIXES.get(path.suffix.lower())
    try:
        if kind == "npy":
            return NumpySource(path, extent)
        if kind == "xarray":
            return XarraySource(path)
        # GDAL knows many more formats by their content than there are extensions in the table.
        return GdalSource(path)
    except WarehouseError:
        raise
    # NumPy, GDAL and xarray raise exceptions of any type on damaged files.
    except Exception as error:
        raise unreadable(path, error) from None
