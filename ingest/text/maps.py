"""The maps that a DBNet learns from, drawn from polygons of text.

The source is section 3.4 of Liao et al., "Real-time Scene Text Detection with Differentiable
Binarization" (arXiv:1911.08947). A polygon of area A and length L is shrunk by D = A (1 - r^2) / L.
The probability map is 1 in the shrunk polygon. The threshold map is 1 - d / D at distance d from
the polygon's border, up to D on both sides, scaled to [low, high]. A pixel of a map holds what is
true at its centre.

Shapely (GEOS) shrinks and clips in floating point. Clipper on whole pixels, which DBNet's own code
uses, was off by up to 1.5 pixels. Given up: coverage of parts of a pixel. Memory: a few floats for
each pixel of a polygon's bounding box.
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
    """How maps are drawn. The defaults are those of the paper and its code.

    Attributes
    ----------
    stride
        Canvas pixels along each side of a map's pixel.
    shrink_ratio
        r, in (0, 1).
    low, high
        The ends of the threshold map, in [0, 1].
    min_side
        In canvas pixels: a polygon whose bounding box has a shorter side is masked.

    Raises
    ------
    ConfigError
        For values outside these ranges.
    """

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
                    expected=(
                        "stride >= 1, 0 < shrink_ratio < 1, 0 <= low < high <= 1, min_side >= 0"
                    ),
                )


DBNET = TextMapSettings()


@dataclass(frozen=True, slots=True)
class TextMaps:
    """The maps of one canvas, [H / stride, W / stride] each.

    Attributes
    ----------
    probability
        float32, 0 or 1.
    probability_mask
        bool: where the loss of `probability` counts, which is not in ignored or too small text.
    threshold
        float32 in [low, high].
    threshold_mask
        bool: inside text that counts, or within D of it.
    too_small
        bool [polygons]: polygons that are not ignored but too small to be learned.
    """

    probability: NDArray[np.float32]
    probability_mask: NDArray[np.bool_]
    threshold: NDArray[np.float32]
    threshold_mask: NDArray[np.bool_]
    too_small: NDArray[np.bool_]


def offset_distance(area: float, length: float, ratio: float) -> float:
    """Return D = A (1 - r^2) / L, in the unit of the polygon."""
    return area * (1 - ratio**2) / length


def shrink_polygon(polygon: Polygon, distance: float) -> list[Polygon]:
    """Return the part of a simple polygon [n, 2] that lies further than `distance` from its border.

    Returns
    -------
    list
        Rings [m, 2], not closed: none where nothing is left, several where the polygon falls apart.
    """
    import shapely

    return _rings(shapely.Polygon(polygon).buffer(-distance, quad_segs=ARC, join_style="round"))


def fault_of(polygon: Polygon, size: tuple[int, int]) -> str | None:
    """Return why a polygon [n, 2] cannot be learned in a picture of size (width, height).

    Returns
    -------
    str or None
        `zero_area`, `self_intersecting` or `outside`; None for a polygon that can be used.
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
    """Draw the maps of one canvas.

    Where polygons overlap, the larger threshold is taken, and masks win over text.

    Parameters
    ----------
    polygons
        float [n, 2] in canvas pixels. One that is not ignored must be simple.
    ignore
        For each polygon, whether it is masked. One that intersects itself is masked as its convex
        hull.
    size
        (H, W) of the canvas.
    within_xyxy
        The part of the canvas that shows the picture; polygons are clipped to it first.
    """
    import shapely

    height, width = size[0] // settings.stride, size[1] // settings.stride
    probability = np.zeros((height, width), np.float32)
    threshold = np.zeros((height, width), np.float32)
    masked = np.zeros((height, width), np.bool_)
    near = np.zeros((height, width), np.bool_)
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
            # Text whose shrunk polygon holds no pixel's centre would be drawn as background, and
            # teach the network that text is none.
            too_small[at] = min(x2 - x1, y2 - y1) < settings.min_side or not drawn.any()
        if ignore[at] or too_small[at]:
            _fill(masked, pieces)
            continue
        probability[drawn] = 1
        for ring in pieces:
            distance = _distance_of(ring, settings.shrink_ratio)
            for window, inside, away in _near_ring(ring, (height, width), distance):
                np.maximum(threshold[window], 1 - away / distance, out=threshold[window])
                near[window] |= inside | (away < distance)
    threshold *= settings.high - settings.low
    threshold += settings.low
    # The sum of two roundings may be one step above the upper end.
    np.minimum(threshold, np.float32(settings.high), out=threshold)
    return TextMaps(probability, ~masked, threshold, near, too_small)


def _fill(map_: NDArray[np.bool_], rings: Sequence[Polygon]) -> None:
    """Set the pixels whose centres lie in any of the rings."""
    height, width = map_.shape
    for ring in rings:
        for window, inside, _ in _near_ring(ring, (height, width), 0.0):
            map_[window] |= inside


def _kernel(pieces: Sequence[Polygon], size: tuple[int, int], ratio: float) -> NDArray[np.bool_]:
    drawn = np.zeros(size, np.bool_)
    for piece in pieces:
        _fill(drawn, shrink_polygon(piece, _distance_of(piece, ratio)))
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

    # Clipping may also leave points and lines where a polygon only touches the border.
    parts = [
        part
        for part in shapely.get_parts(shape)
        if part.geom_type == "Polygon" and not part.is_empty
    ]
    return [np.array(part.exterior.coords, np.float64)[:-1] for part in parts]


def _near_ring(
    ring: Polygon, size: tuple[int, int], margin: float
) -> Iterator[tuple[Any, NDArray[np.bool_], NDArray[np.float64]]]:
    """Yield where the pixels near a ring lie, or nothing if none of them is on the map.

    Yields
    ------
    tuple
        The window of the map within `margin` of the ring's bounding box, whether the centres of its
        pixels are inside the ring, bool [h, w], and their distances to the ring, float64 [h, w].
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
        # The even-odd rule with rays to the right. An edge counts with its upper end only, so that
        # a ray through a corner crosses once.
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * dx / dy)
        # The nearest point of the edge. The bound keeps an edge of no length from dividing by 0.
        square_length = max(dx * dx + dy * dy, np.finfo(np.float64).tiny)
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / square_length, 0, 1)
        np.minimum(square, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2, out=square)
    yield (slice(y1, y2), slice(x1, x2)), inside, np.sqrt(square)
