"""The grid of a cube, and where it lies in another raster: CRS, affine transform, rows and columns.

Declared by a file, by numbers or by a GeoJSON rectangle; its origin is kept as it is, never
snapped. Pixel corners, not centres, are what `transform` maps; rows grow downwards.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from warehouse.errors import ConfigError, SourceError

__all__ = ["Grid", "Window", "grid_of_bounds", "read_extent"]

Window = tuple[int, int, int, int]
"""(first row, first column, rows, columns) of a raster."""
SNAP = 5
MARGIN = 2


@dataclass(frozen=True)
class Grid:
    """crs_wkt: WKT of the CRS; transform: a, b, c, d, e, f of (column, row) -> (x, y).

    Height, width in pixels.
    """

    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    @property
    def crs(self) -> Any:
        return _crs_of(self.crs_wkt)

    @property
    def is_north_up(self) -> bool:
        a, b, _, d, e, _ = self.transform
        return a > 0 and e < 0 and b == d == 0

    @property
    def crs_wkt2(self) -> str:
        """ISO 19162 (WKT2:2019), which `proj:wkt2` and CF's `crs_wkt` are.

        `crs_wkt` may be older.
        """
        return str(self.crs.to_wkt(version="WKT2_2019"))

    @property
    def crs_code(self) -> str | None:
        """Such as EPSG:32633, where the CRS has one."""
        authority = self.crs.to_authority()
        return ":".join(authority) if authority else None

    def bounds(self, window: Window | None = None) -> tuple[float, float, float, float]:
        """left, bottom, right, top of a window, or of all."""
        row, column, rows, columns = window or (0, 0, self.height, self.width)
        corners = [
            self.place_of(x, y) for x in (column, column + columns) for y in (row, row + rows)
        ]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def at(self, window: Window) -> Any:
        """The affine transform of a window."""
        from affine import Affine

        a, b, _, d, e, _ = self.transform
        c, f = self.place_of(window[1], window[0])
        return Affine(a, b, c, d, e, f)

    def snapped(self, other: Grid) -> Grid:
        """This raster with its origin a whole number of 1e-5 pixels from that of `other`, where
        they share a CRS.

        GDAL's mode counts a pixel that a cell overlaps by 1e-9 to 1e-6 of it, or does not, by the
        window it is read in.
        """
        if self.crs != other.crs or not self.is_north_up:
            return self
        a, b, c, d, e, f = self.transform
        left, top = other.transform[2], other.transform[5]
        snapped = (
            a,
            b,
            left + a * round((c - left) / a, SNAP),
            d,
            e,
            top + e * round((f - top) / e, SNAP),
        )
        return Grid(self.crs_wkt, snapped, self.height, self.width)

    def place_of(self, column: float, row: float) -> tuple[float, float]:
        """(x, y) of a pixel corner."""
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f

    def pixel_of(self, x: float, y: float) -> tuple[float, float]:
        """(column, row), the inverse of place_of."""
        a, b, c, d, e, f = self.transform
        area = a * e - b * d
        return (e * (x - c) - b * (y - f)) / area, (a * (y - f) - d * (x - c)) / area

    def window_of(self, other: Grid, window: Window) -> Window | None:
        """The part of this raster that a window of `other` needs, kernels included.

        None where they do not meet.
        """
        from rasterio.errors import CRSError
        from rasterio.warp import transform_bounds

        left, bottom, right, top = other.bounds(window)
        if self.crs != other.crs:
            try:
                left, bottom, right, top = transform_bounds(
                    other.crs, self.crs, left, bottom, right, top, densify_pts=21
                )
            except CRSError:
                return None
        if not all(map(math.isfinite, (left, bottom, right, top))):
            return None
        corners = [self.pixel_of(x, y) for x in (left, right) for y in (bottom, top)]
        columns, rows = [x for x, _ in corners], [y for _, y in corners]
        # Filters reach two target pixels out when they shrink, two source pixels when they enlarge.
        reach_y = MARGIN * (1 + math.ceil((max(rows) - min(rows)) / window[2]))
        reach_x = MARGIN * (1 + math.ceil((max(columns) - min(columns)) / window[3]))
        if (
            max(rows) <= 0
            or max(columns) <= 0
            or min(rows) >= self.height
            or min(columns) >= self.width
        ):
            return None
        first, last = (
            max(0, math.floor(min(rows)) - reach_y),
            min(self.height, math.ceil(max(rows)) + reach_y),
        )
        start, stop = (
            max(0, math.floor(min(columns)) - reach_x),
            min(self.width, math.ceil(max(columns)) + reach_x),
        )
        return first, start, last - first, stop - start


@lru_cache(maxsize=64)
def _crs_of(wkt: str) -> Any:
    from rasterio.crs import CRS

    return CRS.from_wkt(wkt)


def grid_of_bounds(
    crs_wkt: str, bounds: tuple[float, float, float, float], resolution: float, where: Any
) -> Grid:
    """Square pixels from the top left corner on.

    The last row and column may reach beyond the bounds. Raises ConfigError.
    """
    left, bottom, right, top = bounds
    if not (left < right and bottom < top):
        raise ConfigError(
            "the grid's bounds are empty",
            where=where,
            expected="left < right and bottom < top",
            found=list(bounds),
        )
    width, height = (
        math.ceil((right - left) / resolution - 1e-9),
        math.ceil((top - bottom) / resolution - 1e-9),
    )
    return Grid(crs_wkt, (resolution, 0.0, left, 0.0, -resolution, top), height, width)


def crs_wkt_of(text: str, where: Any) -> str:
    """WKT of "EPSG:32633", a URN or WKT. Raises ConfigError."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return str(CRS.from_user_input(text).to_wkt())
    except CRSError as error:
        raise ConfigError(
            "the CRS is unknown",
            where=where,
            found=f"{text!r}: {error}"[:160],
            remedy="write it as EPSG:32633",
        ) from None


def read_extent(path: Path) -> tuple[str, tuple[float, float, float, float]]:
    """(WKT, left bottom right top) of a GeoJSON rectangle with a named CRS. Raises SourceError."""
    try:
        data = json.loads(path.read_bytes())
        name = data["crs"]["properties"]["name"]
        ring = data["coordinates"][0]
        xs, ys = [float(point[0]) for point in ring], [float(point[1]) for point in ring]
    except OSError as error:
        raise SourceError(
            "the extent cannot be read",
            where=path,
            found=error.strerror,
            remedy="check raster.grid.geojson",
        ) from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SourceError(
            "the extent is not a GeoJSON polygon with a named CRS",
            where=path,
            found=f"{type(error).__name__}: {error}"[:120],
            remedy='give {"type": "Polygon", "crs": {"properties": {"name": "EPSG:32633"}}, "coordinates": [...]}',
        ) from None
    bounds = (min(xs), min(ys), max(xs), max(ys))
    if (
        not all(x in bounds[::2] for x in xs)
        or not all(y in bounds[1::2] for y in ys)
        or bounds[0] == bounds[2]
        or bounds[1] == bounds[3]
    ):
        raise SourceError(
            "the extent is not an upright rectangle",
            where=path,
            remedy="give its four corners in the CRS of the data",
        )
    return crs_wkt_of(name, path), bounds
