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
from typing import TYPE_CHECKING

from warehouse.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from affine import Affine
    from rasterio.crs import CRS

__all__ = ["Grid", "Window", "crs_wkt_of", "grid_of_bounds", "read_extent"]

Window = tuple[int, int, int, int]
"""(first row, first column, rows, columns) of a raster."""
SNAP_DIGITS = 5
"""Decimal digits of a pixel that an origin keeps; see `Grid.snapped`."""
MARGIN = 2
"""Pixels that a resampling filter reaches beyond what it fills."""


@dataclass(frozen=True)
class Grid:
    """A regular grid of pixels.

    Attributes
    ----------
    crs_wkt
        The coordinate reference system as WKT, of any version.
    transform
        a, b, c, d, e, f of x = a column + b row + c, y = d column + e row + f, as in Affine and
        rasterio; columns and rows are those of pixel corners.
    height, width
        Numbers of rows and columns.
    """

    crs_wkt: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int

    @property
    def crs(self) -> CRS:
        """The coordinate reference system."""
        return _crs_of(self.crs_wkt)

    @property
    def is_north_up(self) -> bool:
        """Whether columns run east and rows south, without rotation."""
        a, b, _, d, e, _ = self.transform
        return a > 0 and e < 0 and b == d == 0

    @property
    def crs_wkt2(self) -> str:
        """The CRS in WKT2:2019 (ISO 19162), as GeoZarr's `proj:wkt2` and CF's `crs_wkt` have it."""
        return str(self.crs.to_wkt(version="WKT2_2019"))

    @property
    def crs_code(self) -> str | None:
        """Authority and code, such as EPSG:32633; None where the CRS has none."""
        authority = self.crs.to_authority()
        return ":".join(authority) if authority else None

    def bounds(self, window: Window | None = None) -> tuple[float, float, float, float]:
        """Return left, bottom, right and top of a window, or of the whole grid."""
        # All four corners, because a source (unlike the cube) may be rotated.
        row, column, rows, columns = window or (0, 0, self.height, self.width)
        corners = [
            self.xy_of(across, down)
            for across in (column, column + columns)
            for down in (row, row + rows)
        ]
        xs, ys = [x for x, _ in corners], [y for _, y in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def at(self, window: Window) -> Affine:
        """Return the transform of a window."""
        from affine import Affine

        a, b, _, d, e, _ = self.transform
        c, f = self.xy_of(window[1], window[0])
        return Affine(a, b, c, d, e, f)

    def snapped(self, other: Grid) -> Grid:
        """Move the origin to a whole number of 1e-5 pixels from that of `other`.

        Whether GDAL's mode counts a pixel that a cell overlaps by only 1e-9 to 1e-6 of it depends
        on the window that is read, and so on how the cube is cut. Grids of different CRS stay.
        """
        if self.crs != other.crs or not self.is_north_up:
            return self
        a, b, c, d, e, f = self.transform
        left, top = other.transform[2], other.transform[5]
        near_c = left + a * round((c - left) / a, SNAP_DIGITS)
        near_f = top + e * round((f - top) / e, SNAP_DIGITS)
        return Grid(self.crs_wkt, (a, b, near_c, d, e, near_f), self.height, self.width)

    def xy_of(self, column: float, row: float) -> tuple[float, float]:
        """Return the coordinates x and y of a pixel corner."""
        a, b, c, d, e, f = self.transform
        return a * column + b * row + c, d * column + e * row + f

    def pixel_of(self, x: float, y: float) -> tuple[float, float]:
        """Return the column and row of a point; the inverse of `xy_of`."""
        a, b, c, d, e, f = self.transform
        area = a * e - b * d
        return (e * (x - c) - b * (y - f)) / area, (a * (y - f) - d * (x - c)) / area

    def window_of(self, other: Grid, window: Window) -> Window | None:
        """Return the part of this raster that a window of `other` needs.

        It includes the margin that resampling filters reach into.

        Returns
        -------
        Window or None
            None where the two do not overlap.
        """
        from rasterio.errors import CRSError
        from rasterio.warp import transform_bounds

        left, bottom, right, top = other.bounds(window)
        if self.crs != other.crs:
            # The sides of a window are curves in another projection: 21 points on each find how far
            # they reach, which the corners alone would not.
            try:
                left, bottom, right, top = transform_bounds(
                    other.crs, self.crs, left, bottom, right, top, densify_pts=21
                )
            except CRSError:
                # The window lies outside the area in which the projection is defined.
                return None
        # PROJ answers points beyond its projection with infinity instead of an error.
        if not all(map(math.isfinite, (left, bottom, right, top))):
            return None

        corners = [self.pixel_of(x, y) for x in (left, right) for y in (bottom, top)]
        columns, rows = [x for x, _ in corners], [y for _, y in corners]
        # Filters reach two target pixels out when they shrink, two source pixels when they enlarge.
        reach_y = MARGIN * (1 + math.ceil((max(rows) - min(rows)) / window[2]))
        reach_x = MARGIN * (1 + math.ceil((max(columns) - min(columns)) / window[3]))

        if max(rows) <= 0 or min(rows) >= self.height:
            return None
        if max(columns) <= 0 or min(columns) >= self.width:
            return None

        top_row = max(0, math.floor(min(rows)) - reach_y)
        bottom_row = min(self.height, math.ceil(max(rows)) + reach_y)
        left_column = max(0, math.floor(min(columns)) - reach_x)
        right_column = min(self.width, math.ceil(max(columns)) + reach_x)
        return top_row, left_column, bottom_row - top_row, right_column - left_column


@lru_cache(maxsize=64)
def _crs_of(wkt: str) -> CRS:
    from rasterio.crs import CRS

    return CRS.from_wkt(wkt)


def grid_of_bounds(
    crs_wkt: str, bounds: tuple[float, float, float, float], resolution: float, where: object
) -> Grid:
    """Make a grid of square pixels, counted from the top left corner.

    The last row and column may reach beyond the bounds.

    Parameters
    ----------
    bounds
        Left, bottom, right and top in units of the CRS.
    resolution
        Side of a pixel in units of the CRS.
    where
        The settings or file concerned, for messages.

    Raises
    ------
    ConfigError
        If the bounds are empty.
    """
    left, bottom, right, top = bounds
    if not (left < right and bottom < top):
        raise ConfigError(
            "the grid's bounds are empty",
            where=where,
            expected="left < right and bottom < top",
            found=list(bounds),
        )
    # Rounding of the division must not add a row or column.
    width = math.ceil((right - left) / resolution - 1e-9)
    height = math.ceil((top - bottom) / resolution - 1e-9)
    return Grid(crs_wkt, (resolution, 0.0, left, 0.0, -resolution, top), height, width)


def crs_wkt_of(text: str, where: object) -> str:
    """Return the WKT of a CRS that is given as EPSG:32633, as a URN or as WKT.

    Raises
    ------
    ConfigError
        If the CRS is unknown.
    """
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
    """Read a GeoJSON rectangle with a named CRS.

    The member `crs` comes from the format's version of 2008; RFC 7946 removed it.

    Returns
    -------
    tuple
        The CRS as WKT; left, bottom, right and top.

    Raises
    ------
    SourceError
        For anything else.
    """
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
            remedy=(
                'give {"type": "Polygon", "crs": {"properties": {"name": "EPSG:32633"}},'
                ' "coordinates": [...]}'
            ),
        ) from None

    # A polygon with a slanted side would cover only a part of the array.
    left, bottom, right, top = min(xs), min(ys), max(xs), max(ys)
    is_upright = all(x in (left, right) for x in xs) and all(y in (bottom, top) for y in ys)
    if not is_upright or left == right or bottom == top:
        raise SourceError(
            "the extent is not an upright rectangle",
            where=path,
            remedy="give its four corners in the CRS of the data",
        )
    return crs_wkt_of(name, path), (left, bottom, right, top)
