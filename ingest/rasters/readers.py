"""Raster files as windows of float32 with NaN where nothing was measured: GeoTIFF, .npy with an
extent, NetCDF and Zarr.

A source is opened once a process (`open_raster` keeps the last few) and read by window, never
whole. A band's own nodata, its mask or alpha, or the declared nodata become NaN, band by band: a
hole in one band leaves the others alone. Memory: the windows asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window, read_extent
from warehouse.errors import SourceError, WarehouseError

__all__ = ["SUFFIXES", "RasterSource", "open_raster"]

SUFFIXES = {
    ".tif": "tiff",
    ".tiff": "tiff",
    ".jp2": "tiff",
    ".npy": "npy",
    ".nc": "xarray",
    ".zarr": "xarray",
}
OPEN_AT_ONCE = 32
Band = int | str
Y_NAMES, X_NAMES = ("y", "lat", "latitude", "northing"), ("x", "lon", "longitude", "easting")


class RasterSource(Protocol):
    """One raster file. times: its dates (datetime64[s]) when it holds a time axis, else None.

    A .npy's come from a side file.
    """

    grid: Grid
    steps: int | None
    times: NDArray[np.datetime64] | None

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """One array [rows, columns] a band, NaN where missing. Raises SourceError."""

    def declares_nan(self, band: Band) -> bool:
        """Whether the file itself says that NaN, or anything else decoded to it, means missing."""

    def check(self, band: Band) -> None:
        """Raises SourceError for a band that is not there."""


def open_raster(path: Path, extent: Path | None = None) -> RasterSource:
    """extent: GeoJSON rectangle of a .npy. Raises SourceError: unreadable, truncated, no CRS."""
    try:
        info = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return _open(path, extent, (info.st_size, info.st_mtime_ns))


@lru_cache(maxsize=OPEN_AT_ONCE)
def _open(path: Path, extent: Path | None, stamp: tuple[int, int]) -> RasterSource:
    kind = SUFFIXES.get(path.suffix.lower())
    try:
        if kind == "npy":
            return NumpySource(path, extent)
        return XarraySource(path) if kind == "xarray" else TiffSource(path)
    except WarehouseError:
        raise
    except Exception as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> SourceError:
    remedy = "copy the file again, or leave it out of the feature's files"
    return SourceError(
        "a raster cannot be read",
        where=path,
        found=f"{type(error).__name__}: {error}"[:200],
        remedy=remedy,
    )


def no_crs(path: Path) -> SourceError:
    return SourceError(
        "a raster has no CRS",
        where=path,
        remedy="write it into the file: rio edit-info --crs EPSG:32633 FILE",
    )


def no_band(path: Path, band: Band, known: Sequence[Any]) -> SourceError:
    return SourceError(
        f"a raster has no band {band!r}",
        where=path,
        expected=f"one of {', '.join(map(str, known))}",
        remedy="correct band",
    )


class TiffSource:
    """A file GDAL reads, one date. Not shared between threads."""

    steps = None
    times = None

    def __init__(self, path: Path) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self.path, self.file = path, rasterio.open(path)
        if self.file.crs is None:
            raise no_crs(path)
        self.grid = Grid(
            self.file.crs.to_wkt(),
            tuple(self.file.transform)[:6],
            self.file.height,
            self.file.width,
        )
        self.masks = [
            any(flag.name in {"per_dataset", "alpha"} for flag in flags)
            for flags in self.file.mask_flag_enums
        ]

    def check(self, band: Band) -> None:
        if not isinstance(band, int) or not 1 <= band <= self.file.count:
            raise no_band(self.path, band, range(1, self.file.count + 1))

    def declares_nan(self, band: Band) -> bool:
        return self.masks[int(band) - 1] or self.file.nodatavals[int(band) - 1] is not None

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        from rasterio.windows import Window as Part

        part = Part(window[1], window[0], window[3], window[2])
        numbers = [int(band) for band in bands]
        try:
            raw = self.file.read(numbers, window=part)
            masks = {
                band: self.file.read_masks(band, window=part)
                for band in numbers
                if self.masks[band - 1]
            }
        except Exception as error:
            raise unreadable(self.path, error) from None
        out = []
        for values, band in zip(raw, numbers, strict=True):
            nodata = self.file.nodatavals[band - 1]
            plane = missing_at(values, nodata)
            if band in masks:
                plane[masks[band] == 0] = np.nan
            out.append(plane)
        return out


class NumpySource:
    """[time, y, x, band], [y, x, band] or [y, x] in a .npy.

    Its place is a GeoJSON rectangle, its dates a side file's.
    """

    times = None

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
        if not isinstance(band, int) or not 1 <= band <= self.bands:
            raise no_band(self.path, band, range(1, self.bands + 1))

    def declares_nan(self, band: Band) -> bool:
        return False

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        row, column, rows, columns = window
        # Mapped anew each time: pages of a map that is kept count as this process's memory.
        try:
            data = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise unreadable(self.path, error) from None
        plane = data[:, :, None] if data.ndim == 2 else data if step is None else data[step]
        return [
            plane[row : row + rows, column : column + columns, int(band) - 1].astype(np.float32)
            for band in bands
        ]


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
        self.times, self.steps = None, None
        if "time" in names:
            self.times = self.data["time"].values.astype("datetime64[s]")
            self.steps = len(self.times)
        self.grid = self._grid()

    def _grid(self) -> Grid:
        from rasterio.crs import CRS

        wkt = next((text for text in self._crs_texts() if text), None)
        if wkt is None:
            raise no_crs(self.path)
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

    def _crs_texts(self) -> Any:
        for each in (*self.data.data_vars.values(), *self.data.coords.values()):
            yield each.attrs.get("crs_wkt") or each.attrs.get("spatial_ref")
        for key in ("proj:wkt2", "proj:code", "crs_wkt", "crs"):
            yield self.data.attrs.get(key)

    def check(self, band: Band) -> None:
        if band not in self.bands:
            raise no_band(self.path, band, self.bands)

    def declares_nan(self, band: Band) -> bool:
        return (
            "_FillValue" in self.data[band].encoding or "missing_value" in self.data[band].encoding
        )

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
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
            raise unreadable(self.path, error) from None
        return out


def missing_at(values: NDArray[Any], nodata: float | None) -> NDArray[np.float32]:
    """float32 copy, NaN where `values` is nodata.

    Compared before the conversion, which may round.
    """
    plane = values.astype(np.float32)
    if nodata is not None and not np.isnan(nodata):
        plane[values == nodata] = np.nan
    return plane
