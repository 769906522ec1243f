"""GeoTIFF and JPEG 2000 files, read by GDAL through rasterio."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window
from ingest.rasters.readers.source import Band, missing_at, no_band, no_crs, unreadable

__all__ = ["GdalSource"]


class GdalSource:
    """A file that GDAL reads, of one date.

    GDAL's datasets are not safe to share between threads, so each process opens its own.
    """

    steps: int | None = None
    times: NDArray[np.datetime64] | None = None

    def __init__(self, path: Path) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        self.path = path
        # A file without a CRS is refused below, with a remedy, instead of warned of.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self.file = rasterio.open(path)
        if self.file.crs is None:
            raise no_crs(path)
        wkt, transform = self.file.crs.to_wkt(), tuple(self.file.transform)[:6]
        self.grid = Grid(wkt, transform, self.file.height, self.file.width)

        # GDAL gives every band a mask, also one that it makes up from the nodata value. Only masks
        # in the file itself are worth a second read.
        self.has_mask = [
            any(flag.name in {"per_dataset", "alpha"} for flag in flags)
            for flags in self.file.mask_flag_enums
        ]

    def check(self, band: Band) -> None:
        """See `RasterSource.check`."""
        if not isinstance(band, int) or not 1 <= band <= self.file.count:
            raise no_band(self.path, band, range(1, self.file.count + 1))

    def declares_nan(self, band: Band) -> bool:
        """Return whether the band has a mask, an alpha band or a nodata value."""
        at = int(band) - 1
        return self.has_mask[at] or self.file.nodatavals[at] is not None

    def read(
        self, step: int | None, bands: Sequence[Band], window: Window
    ) -> list[NDArray[np.float32]]:
        """See `RasterSource.read`."""
        from rasterio.windows import Window as Part

        part = Part(window[1], window[0], window[3], window[2])
        numbers = [int(band) for band in bands]
        try:
            raw = self.file.read(numbers, window=part)
            masked = [band for band in numbers if self.has_mask[band - 1]]
            masks = {band: self.file.read_masks(band, window=part) for band in masked}
        # A truncated file fails here, block by block, with GDAL's own exceptions.
        except Exception as error:
            raise unreadable(self.path, error) from None

        out = []
        for values, band in zip(raw, numbers, strict=True):
            plane = missing_at(values, self.file.nodatavals[band - 1])
            if band in masks:
                plane[masks[band] == 0] = np.nan
            out.append(plane)
        return out
