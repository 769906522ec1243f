"""Raster files as windows of float32 with NaN where nothing was measured.

GeoTIFF and JPEG 2000 through GDAL, .npy with an extent, NetCDF and Zarr through xarray. A source is
opened once a process (`open_raster` keeps the last few) and read by window, never whole. A band's
own nodata, its mask or alpha, or the declared nodata become NaN, band by band, so that a missing
value in one band leaves the others alone. Memory: the windows asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window, read_extent
from ingest.rasters.settings import RASTER_SUFFIXES
from warehouse.errors import SourceError, WarehouseError

__all__ = ["RasterSource", "missing_at", "open_raster"]

OPEN_AT_ONCE = 32
Band = int | str
"""Number of a band, from 1, or the name of a variable."""
Y_NAMES, X_NAMES = ("y", "lat", "latitude", "northing"), ("x", "lon", "longitude", "easting")


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
        """Whether the file itself says that NaN, or what is decoded to NaN, means missing."""

    def check(self, band: Band) -> None:
        """Raise SourceError for a band that is not there."""


def open_raster(path: Path, extent: Path | None = None) -> RasterSource:
    """Open a raster, or return it where it is open already.

    Parameters
    ----------
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
        raise _unreadable(path, error) from None
    return _open(path, extent, (info.st_size, info.st_mtime_ns))


@lru_cache(maxsize=OPEN_AT_ONCE)
def _open(path: Path, extent: Path | None, stamp: tuple[int, int]) -> RasterSource:
    # A file that changed has another stamp, and so is opened again.
    kind = RASTER_SUFFIXES.get(path.suffix.lower())
    try:
        if kind == "npy":
            return NumpySource(path, extent)
        return XarraySource(path) if kind == "xarray" else GdalSource(path)
    except WarehouseError:
        raise
    except Exception as error:  # NumPy, GDAL and xarray raise anything on damaged files
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SourceError:
    return SourceError(
        "a raster cannot be read",
        where=path,
        found=f"{type(error).__name__}: {error}"[:200],
        remedy="copy the file again, or leave it out of the feature's files",
    )


def _no_crs(path: Path) -> SourceError:
    return SourceError(
        "a raster has no CRS",
        where=path,
        remedy="write it into the file: rio edit-info --crs EPSG:32633 FILE",
    )


def _no_band(path: Path, band: Band, known: Sequence[Band]) -> SourceError:
    return SourceError(
        f"a raster has no band {band!r}",
        where=path,
        expected=f"one of {', '.join(map(str, known))}",
        remedy="correct the feature's band",
    )


class GdalSource:
    """A file that GDAL reads, of one date. Not to be shared between threads."""

    steps: int | None = None
    times: NDArray[np.datetime64] | None = None

    def __init__(self, path: Path) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self.path, self.file = path, rasterio.open(path)
        if self.file.crs is None:
            raise _no_crs(path)
        wkt, transform = self.file.crs.to_wkt(), tuple(self.file.transform)[:6]
        self.grid = Grid(wkt, transform, self.file.height, self.file.width)
        self.masks = [
            any(flag.name in {"per_dataset", "alpha"} for flag in flags)
            for flags in self.file.mask_flag_enums
        ]

    def check(self, band: Band) -> None:
        """See `RasterSource.check`."""
        if not isinstance(band, int) or not 1 <= band <= self.file.count:
            raise _no_band(self.path, band, range(1, self.file.count + 1))

    def declares_nan(self, band: Band) -> bool:
        """Whether the band has a mask, an alpha band or a nodata value."""
        return self.masks[int(band) - 1] or self.file.nodatavals[int(band) - 1] is not None

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """See `RasterSource.read`."""
        from rasterio.windows import Window as Part

        part = Part(window[1], window[0], window[3], window[2])
        numbers = [int(band) for band in bands]
        try:
            raw = self.file.read(numbers, window=part)
            masked = [band for band in numbers if self.masks[band - 1]]
            masks = {band: self.file.read_masks(band, window=part) for band in masked}
        except Exception as error:
            raise _unreadable(self.path, error) from None
        out = []
        for values, band in zip(raw, numbers, strict=True):
            nodata = self.file.nodatavals[band - 1]
            plane = missing_at(values, nodata)
            if band in masks:
                plane[masks[band] == 0] = np.nan
            out.append(plane)
        return out


class NumpySource:
    """A .npy: [time, y, x, band], [y, x, band] or [y, x].

    A GeoJSON rectangle says where it lies, a side file which dates it has.
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
            raise _no_band(self.path, band, range(1, self.bands + 1))

    def declares_nan(self, band: Band) -> bool:
        """Never: a .npy has nowhere to say so."""
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
            raise _unreadable(self.path, error) from None
        if data.ndim == 2:
            data = data[:, :, None]
        elif step is not None:
            data = data[step]
        part = data[row : row + rows, column : column + columns]
        return [part[:, :, int(band) - 1].astype(np.float32) for band in bands]


class XarraySource:
    """NetCDF or Zarr: bands are variables [time?, y, x] on one regular grid."""

    def __init__(self, path: Path) -> None:
        import xarray

        self.path = path
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore",
                message="Failed to open Zarr store with consolidated metadata",
                category=RuntimeWarning,
            )
            self.data = (
                xarray.open_zarr(path, chunks=None)
                if path.suffix == ".zarr"
                else xarray.open_dataset(path)
            )
        names = [str(name) for name in self.data.dims]
        self.y, self.x = (
            next((name for name in names if name.lower() in known), "")
            for known in (Y_NAMES, X_NAMES)
        )
        if not self.y or not self.x:
            raise SourceError(
                "a dataset has no y and x",
                where=path,
                expected=f"dimensions such as {Y_NAMES} and {X_NAMES}",
                found=names,
            )
        self.bands = [
            str(name)
            for name, each in self.data.data_vars.items()
            if {self.y, self.x} <= set(each.dims)
        ]
        self.times: NDArray[np.datetime64] | None = None
        self.steps: int | None = None
        if "time" in names:
            self.times = self.data["time"].values.astype("datetime64[s]")
            self.steps = self.data.sizes["time"]
        self.grid = self._grid()

    def _grid(self) -> Grid:
        from rasterio.crs import CRS

        wkt = next((text for text in self._crs_texts() if text), None)
        if wkt is None:
            raise _no_crs(self.path)
        edges = []
        for name in (self.x, self.y):
            centres = self.data[name].values.astype(np.float64)
            step = (centres[-1] - centres[0]) / max(1, len(centres) - 1)
            if len(centres) < 2 or not np.allclose(np.diff(centres), step, rtol=1e-3):
                raise SourceError(
                    "a dataset's grid is not regular",
                    where=f"{self.path}, {name}",
                    remedy="resample it to even steps first",
                )
            edges.append((float(step), float(centres[0] - step / 2)))
        (a, c), (e, f) = edges
        return Grid(
            CRS.from_user_input(wkt).to_wkt(),
            (a, 0.0, c, 0.0, e, f),
            self.data.sizes[self.y],
            self.data.sizes[self.x],
        )

    def _crs_texts(self) -> Iterator[str | None]:
        """Where a CRS may stand: CF's grid mapping, then attributes of GeoZarr and others."""
        for each in (*self.data.data_vars.values(), *self.data.coords.values()):
            yield each.attrs.get("crs_wkt") or each.attrs.get("spatial_ref")
        for key in ("proj:wkt2", "proj:code", "crs_wkt", "crs"):
            yield self.data.attrs.get(key)

    def check(self, band: Band) -> None:
        """See `RasterSource.check`."""
        if band not in self.bands:
            raise _no_band(self.path, band, self.bands)

    def declares_nan(self, band: Band) -> bool:
        """Whether the variable has a fill value, by the names that CF gives it."""
        encoding = self.data[band].encoding
        return "_FillValue" in encoding or "missing_value" in encoding

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """See `RasterSource.read`."""
        row, column, rows, columns = window
        out = []
        try:
            for band in bands:
                values = self.data[band].isel(
                    {self.y: slice(row, row + rows), self.x: slice(column, column + columns)}
                )
                values = values.isel(time=step) if "time" in values.dims else values
                out.append(values.transpose(self.y, self.x).values.astype(np.float32))
        except (OSError, RuntimeError, ValueError) as error:
            raise _unreadable(self.path, error) from None
        return out


def missing_at(values: NDArray[Any], nodata: float | None) -> NDArray[np.float32]:
    """Return a copy as float32 that is NaN where `values` equals `nodata`.

    The values are compared before the conversion, which may round.
    """
    plane = values.astype(np.float32)
    if nodata is not None and not np.isnan(nodata):
        plane[values == nodata] = np.nan
    return plane
