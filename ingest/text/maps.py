"""Polygons of text -> the maps a DBNet learns from (Liao et al., Real-time Scene Text Detection
with Differentiable Binarization, arXiv:1911.08947, section 3.4).

A polygon of area A and length L is shrunk by D = A (1 - r^2) / L. probability: 1 in the shrunk
polygon. threshold: 1 - d / D at distance d from the polygon's border, up to D on both sides, scaled
to [low, high]. A map's pixel is what is true at its centre. Shrinking and clipping are Shapely's
(GEOS), in floating point: Clipper on whole pixels, as DBNet's own code has it, was off by up to 1.5
pixels. Given up: coverage of parts of a pixel. Memory: windows of the maps, a few floats a pixel of
a polygon's bounding box.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import ConfigError

__all__ = [
    "DBNET",
    "TextMapSettings",
    "TextMaps",
    "draw_text_maps",
    "fault_of",
    "offset_distance",
    "shrink_polygon",
]

ARC = 16
"""Segments of a quarter circle, at corners that point inwards: within 0.5% of D."""
Polygon = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TextMapSettings:
    """stride: canvas pixels of a map's pixel; shrink_ratio: r; low, high: ends of the threshold
    map; min_side: of a polygon's bounding box in canvas pixels, below which it is masked. The
    defaults are the paper's and its code's. Raises ConfigError."""

    stride: int = 4
    shrink_ratio: float = 0.4
    low: float = 0.3
    high: float = 0.7
    min_side: float = 8.0

    def __post_init__(self) -> None:
        found = {
            "stride": self.stride >= 1,
            "shrink_ratio": 0 < self.shrink_ratio < 1,
            "low": 0 <= self.low < self.high <= 1,
            "min_side": self.min_side >= 0,
        }
        for name, right in found.items():
            if not right:
                raise ConfigError(
                    "impossible setting of text maps",
                    where=name,
                    found=getattr(self, name),
                    expected="stride >= 1, 0 < shrink_ratio < 1, 0 <= low < high <= 1, min_side >= 0",
                )


DBNET = TextMapSettings()


@dataclass(frozen=True, slots=True)
class TextMaps:
    """[H / stride, W / stride] each.

    probability: float32, 0 or 1; probability_mask: bool, where its loss counts: not in ignored and
    too small text. threshold: float32 in [low, high]; threshold_mask: bool, within D of text that
    counts or inside it. too_small: bool [polygons], of those not ignored.
    """

    probability: NDArray[np.float32]
    probability_mask: NDArray[np.bool_]
    threshold: NDArray[np.float32]
    threshold_mask: NDArray[np.bool_]
    too_small: NDArray[np.bool_]


def offset_distance(area: float, length: float, ratio: float) -> float:
    """D = A (1 - r^2) / L, in the unit of the polygon."""
    return area * (1 - ratio**2) / length


def shrink_polygon(polygon: Polygon, distance: float) -> list[Polygon]:
    """What is left of a simple polygon [n, 2] further than `distance` from its border.

    None, one or several rings [m, 2], not closed.
    """
    import shapely

    return _rings(shapely.Polygon(polygon).buffer(-distance, quad_segs=ARC, join_style="round"))


def fault_of(polygon: Polygon, size: tuple[int, int]) -> str | None:
    """Why a polygon [n, 2] cannot be learnt from, for a picture of size (width, height).

    zero_area, self_intersecting, outside; or None.
    """
    import shapely

    shape = shapely.Polygon(polygon)
    if shape.convex_hull.area == 0:
        return "zero_area"
    if not shape.is_valid:
        return "self_intersecting"
    return "outside" if shape.intersection(shapely.box(0, 0, *size)).area == 0 else None


def draw_text_maps(
    polygons: Sequence[Polygon],
    ignore: Sequence[bool],
    size: tuple[int, int],
    *,
    within_xyxy: tuple[float, float, float, float],
    settings: TextMapSettings,
) -> TextMaps:
    """Maps of polygons [n, 2] in pixels of a canvas of `size` (H, W); one that is not ignored must
    be simple.

    within_xyxy: the part of the canvas that shows the picture; polygons are clipped to it first. An
    ignored polygon is masked whole, one that intersects itself as its convex hull. Too small: a
    bounding box under min_side, or no map pixel's centre in the shrunk polygon, which would teach
    that text is background. Overlaps: the larger threshold; masks win over text.
    """
    import shapely

    height, width = size[0] // settings.stride, size[1] // settings.stride
    probability, threshold = (
        np.zeros((height, width), np.float32),
        np.zeros((height, width), np.float32),
    )
    masked, near = np.zeros((height, width), np.bool_), np.zeros((height, width), np.bool_)
    too_small = np.zeros(len(polygons), np.bool_)
    picture = shapely.box(*within_xyxy)
    for at, polygon in enumerate(polygons):
        shape = shapely.Polygon(polygon)
        if ignore[at] and not shape.is_valid:
            shape = shape.convex_hull
        part = shape.intersection(picture)
        pieces = [ring / settings.stride for ring in _rings(part)]
        if not ignore[at]:
            drawn = _kernel(pieces, (height, width), settings.shrink_ratio)
            x1, y1, x2, y2 = part.bounds
            too_small[at] = min(x2 - x1, y2 - y1) < settings.min_side or not drawn.any()
        if ignore[at] or too_small[at]:
            for ring in pieces:
                for window, inside, _ in _look(ring, (height, width), 0.0):
                    masked[window] |= inside
            continue
        probability[drawn] = 1
        for ring in pieces:
            distance = _distance_of(ring, settings.shrink_ratio)
            for window, inside, away in _look(ring, (height, width), distance):
                np.maximum(threshold[window], 1 - away / distance, out=threshold[window])
                near[window] |= inside | (away < distance)
    threshold *= settings.high - settings.low
    threshold += settings.low
    np.minimum(
        threshold, np.float32(settings.high), out=threshold
    )  # the sum of two roundings may be one step above
    return TextMaps(probability, ~masked, threshold, near, too_small)


def _kernel(pieces: Sequence[Polygon], size: tuple[int, int], ratio: float) -> NDArray[np.bool_]:
    drawn = np.zeros(size, np.bool_)
    for piece in pieces:
        for ring in shrink_polygon(piece, _distance_of(piece, ratio)):
            for window, inside, _ in _look(ring, size, 0.0):
                drawn[window] |= inside
    return drawn


def _distance_of(ring: Polygon, ratio: float) -> float:
    import shapely

    shape = shapely.Polygon(ring)
    return offset_distance(shape.area, shape.length, ratio)


def _rings(shape: Any) -> list[Polygon]:
    """Outer rings of every polygon in a geometry, first point not repeated.

    Neither shrinking nor clipping makes holes.
    """
    import shapely

    parts = [
        part
        for part in shapely.get_parts(shape)
        if part.geom_type == "Polygon" and not part.is_empty
    ]
    return [np.array(part.exterior.coords, np.float64)[:-1] for part in parts]


def _look(
    ring: Polygon, size: tuple[int, int], margin: float
) -> Iterator[tuple[Any, NDArray[np.bool_], NDArray[np.float64]]]:
    """(window, bool inside, distance to the ring) at the centres of a map's pixels within `margin`
    of the ring's bounding box.

    Nothing where that is outside the map. Inside is even-odd: rays to the right, an edge counts
    with its upper end.
    """
    (left, top), (right, bottom) = ring.min(axis=0) - margin, ring.max(axis=0) + margin
    x1, x2 = max(0, int(np.floor(left))), min(size[1], int(np.ceil(right)))
    y1, y2 = max(0, int(np.floor(top))), min(size[0], int(np.ceil(bottom)))
    if x1 >= x2 or y1 >= y2:
        return
    x, y = np.arange(x1, x2) + 0.5, (np.arange(y1, y2) + 0.5)[:, None]
    inside, square = np.zeros((y2 - y1, x2 - x1), np.bool_), np.full((y2 - y1, x2 - x1), np.inf)
    for (ax, ay), (bx, by) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        dx, dy = bx - ax, by - ay
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / dy)
        along = np.clip(
            ((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, np.finfo(np.float64).tiny),
            0,
            1,
        )
        np.minimum(square, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2, out=square)
    yield (slice(y1, y2), slice(x1, x2)), inside, np.sqrt(square)
