"""NetCDF files and Zarr stores, read by xarray."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window
from ingest.rasters.readers.source import Band, no_band, no_crs, unreadable
from warehouse.errors import SourceError

__all__ = ["XarraySource"]

Y_NAMES, X_NAMES = ("y", "lat", "latitude", "northing"), ("x", "lon", "longitude", "easting")


class XarraySource:
    """A data set whose bands are variables [y, x] or [time, y, x] on one regular grid."""

    def __init__(self, path: Path) -> None:
        import xarray

        self.path = path
        # Consolidated metadata are optional in a Zarr store, so nothing is wrong without them.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore",
                message="Failed to open Zarr store with consolidated metadata",
                category=RuntimeWarning,
            )
            if path.suffix == ".zarr":
                # Without Dask: a window is one indexed read, for which a task graph is no use.
                self.data = xarray.open_zarr(path, chunks=None)
            else:
                self.data = xarray.open_dataset(path)

        names = [str(name) for name in self.data.dims]
        self.y = next((name for name in names if name.lower() in Y_NAMES), "")
        self.x = next((name for name in names if name.lower() in X_NAMES), "")
        if not self.y or not self.x:
            raise SourceError(
                "a dataset has no y and x",
                where=path,
                expected=f"dimensions such as {Y_NAMES} and {X_NAMES}",
                found=names,
            )

        # Variables such as CF's grid mapping and the bounds of cells are no bands.
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
            raise no_crs(self.path)

        edges = []
        for name in (self.x, self.y):
            centres = self.data[name].values.astype(np.float64)
            # Coordinates are stored rounded, often as float32: a thousandth of a step is even.
            step = (centres[-1] - centres[0]) / max(1, len(centres) - 1)
            if len(centres) < 2 or not np.allclose(np.diff(centres), step, rtol=1e-3):
                raise SourceError(
                    "a dataset's grid is not regular",
                    where=f"{self.path}, {name}",
                    remedy="resample it to even steps first",
                )
            # CF coordinates are the centres of pixels, `Grid` counts from their corners.
            edges.append((float(step), float(centres[0] - step / 2)))
        (a, c), (e, f) = edges
        return Grid(
            CRS.from_user_input(wkt).to_wkt(),
            (a, 0.0, c, 0.0, e, f),
            self.data.sizes[self.y],
            self.data.sizes[self.x],
        )

    def _crs_texts(self) -> Iterator[str | None]:
        """Yield what stands where a CRS may: CF's grid mapping, then GeoZarr and others."""
        for each in (*self.data.data_vars.values(), *self.data.coords.values()):
            yield each.attrs.get("crs_wkt") or each.attrs.get("spatial_ref")
        for key in ("proj:wkt2", "proj:code", "crs_wkt", "crs"):
            yield self.data.attrs.get(key)

    def check(self, band: Band) -> None:
        """See `RasterSource.check`."""
        if band not in self.bands:
            raise no_band(self.path, band, self.bands)

    def declares_nan(self, band: Band) -> bool:
        """Return whether the variable has a fill value, under either name that CF gives it."""
        encoding = self.data[band].encoding
        return "_FillValue" in encoding or "missing_value" in encoding

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """See `RasterSource.read`."""
        row, column, rows, columns = window
        out = []
        part = {self.y: slice(row, row + rows), self.x: slice(column, column + columns)}
        try:
            for band in bands:
                values = self.data[band].isel(part)
                # A data set with dates may hold static variables too, such as elevation.
                if "time" in values.dims:
                    values = values.isel(time=step)
                out.append(values.transpose(self.y, self.x).values.astype(np.float32))
        except (OSError, RuntimeError, ValueError) as error:
            raise unreadable(self.path, error) from None
        return out
