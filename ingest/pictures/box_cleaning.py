"""Cleaning the boxes of a picture: oriented, judged, clipped, and carried to the canvas.

Every box ends up kept, or in exactly one list of drops with its reason, in the source's order. The
reasons in BAD are faults of the annotation; `tiny` and `duplicate` are cleaning, and
`over_max_boxes` follows from `too_many_boxes: truncate`. Clipping a box is always done, and flagged
only where half a pixel or more was outside: less is rounding of the annotation tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.letterbox import Geometry
from warehouse.format.schema import CLIPPED

__all__ = [
    "BAD",
    "REASONS",
    "CleanBoxes",
    "clean_boxes",
    "keep_largest",
    "orient_boxes",
    "to_canvas",
]

REASONS = (
    "nan",
    "unknown_class",
    "reversed",
    "zero_area",
    "outside",
    "tiny",
    "duplicate",
    "over_max_boxes",
)
BAD = frozenset(REASONS[:5])
CLIP_NOISE_PX = 0.5
LEAST_CANVAS_PX = 1 - 1e-6
"""Shortest side of a box. The tolerance keeps a box of exactly one pixel, whose side is a quotient
of two roundings.
"""
Boxes = NDArray[np.float64]
"""float64 [n, 4]: x1, y1, x2, y2."""


@dataclass(frozen=True, slots=True)
class CleanBoxes:
    """The boxes of one picture after cleaning.

    Attributes
    ----------
    boxes_xyxy
        float64 [n, 4] in pixels of the picture as shown: ordered, inside.
    labels
        int16 [n], indices of classes.
    flags
        uint8 [n], bits of `warehouse.format.schema`.
    dropped
        Index in the annotation and reason of each box that was dropped.
    """

    boxes_xyxy: Boxes
    labels: NDArray[np.int16]
    flags: NDArray[np.uint8]
    dropped: tuple[tuple[int, str], ...]

    @property
    def clipped(self) -> int:
        """Number of kept boxes that were clipped."""
        return int(np.count_nonzero(self.flags & CLIPPED))


def to_canvas(boxes_xyxy: Boxes, geometry: Geometry, target_size: tuple[int, int]) -> Boxes:
    """Carry boxes to the canvas.

    Parameters
    ----------
    boxes_xyxy
        float64 [n, 4] in pixels of the picture as shown.
    target_size
        Height and width of the canvas.

    Returns
    -------
    NDArray
        float64 [n, 4], normalised to [0, 1] by the width and height of the canvas.
    """
    height, width = target_size
    sides = np.array([width, height, width, height], np.float64)
    return (boxes_xyxy * _scale(geometry) + _pad(geometry)) / sides


def orient_boxes(
    boxes_xyxy: Boxes, stored_width: float, stored_height: float, orientation: int
) -> Boxes:
    """Carry boxes of the picture as stored to the picture as shown.

    A reversed box stays reversed, so that cleaning can recognise it.

    Parameters
    ----------
    boxes_xyxy
        float64 [n, 4] in pixels of the picture as stored.
    stored_width, stored_height
        Size of the picture as stored.
    orientation
        EXIF orientation, 1 to 8.
    """
    x1, y1, x2, y2 = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4).T
    width, height = stored_width, stored_height
    corners = {
        1: (x1, y1, x2, y2),
        2: (width - x2, y1, width - x1, y2),
        3: (width - x2, height - y2, width - x1, height - y1),
        4: (x1, height - y2, x2, height - y1),
        5: (y1, x1, y2, x2),
        6: (height - y2, x1, height - y1, x2),
        7: (height - y2, width - x2, height - y1, width - x1),
        8: (y1, width - x2, y2, width - x1),
    }[orientation]
    return np.stack(corners, axis=1)


def clean_boxes(
    boxes_xyxy: Boxes,
    class_ids: Sequence[int],
    flags: Sequence[int],
    size: tuple[int, int],
    geometry: Geometry,
) -> CleanBoxes:
    """Judge the boxes of one picture.

    A box is dropped for the first reason that holds: a coordinate is not finite; the class is
    unknown; x2 < x1 or y2 < y1; it has no area; no part of it is inside the picture; it is less
    than one canvas pixel wide or high; an earlier box has the same class and clipped corners.

    Parameters
    ----------
    boxes_xyxy
        float64 [n, 4] in pixels of the picture as shown; any values.
    class_ids
        Index of each box's class, -1 where unknown.
    flags
        Bits of `warehouse.format.schema` for each box.
    size
        Width and height of the picture as shown.
    geometry
        Where the picture lies on its canvas.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    ids = np.asarray(class_ids, np.int64).reshape(-1)
    bits = np.asarray(flags, np.uint8).reshape(-1).copy()
    if not len(boxes):
        return CleanBoxes(boxes, ids.astype(np.int16), bits, ())

    # All boxes of the picture at once: data sets have millions of them.
    reason = np.full(len(boxes), -1, np.int8)

    def drop(where: NDArray[np.bool_] | np.bool_, name: str) -> None:
        reason[where & (reason < 0)] = REASONS.index(name)

    drop(~np.isfinite(boxes).all(axis=1), "nan")
    drop(ids < 0, "unknown_class")
    # Dropped boxes become zeros, so that NaN and infinity raise no warnings below.
    finite = np.where(reason[:, None] < 0, boxes, 0.0)
    sides = finite[:, 2:] - finite[:, :2]
    drop((sides < 0).any(axis=1), "reversed")
    drop((sides == 0).any(axis=1), "zero_area")

    limits = np.array([size[0], size[1], size[0], size[1]], np.float64)
    clipped = np.clip(finite, 0.0, limits)
    inner = clipped[:, 2:] - clipped[:, :2]
    drop((inner <= 0).any(axis=1), "outside")
    # On the canvas, where training sees the box: in a large source even ten pixels may vanish.
    drop((inner * _scale(geometry)[:2] < LEAST_CANVAS_PX).any(axis=1), "tiny")

    reason[_repeats(clipped, ids, reason < 0)] = REASONS.index("duplicate")

    # Boxes whose corners only carry rounding errors of the annotation tool are not called clipped.
    bits[(np.abs(finite - clipped) >= CLIP_NOISE_PX).any(axis=1)] |= CLIPPED
    keep = reason < 0
    dropped = tuple((int(at), REASONS[reason[at]]) for at in np.flatnonzero(~keep))
    return CleanBoxes(clipped[keep], ids[keep].astype(np.int16), bits[keep], dropped)


def _repeats(clipped: Boxes, ids: NDArray[np.int64], kept: NDArray[np.bool_]) -> list[int]:
    """Return the indices of kept boxes that repeat an earlier one of the same class."""
    # Compared after clipping: two boxes that differ only outside the picture are the same there.
    seen: set[tuple[float, ...]] = set()
    repeats = []
    for at in np.flatnonzero(kept).tolist():
        key = (*clipped[at].tolist(), float(ids[at]))
        if key in seen:
            repeats.append(at)
        seen.add(key)
    return repeats


def keep_largest(boxes_xyxy: Boxes, most: int) -> NDArray[np.intp]:
    """Return the indices of the `most` boxes of largest area, ascending; of equals the first."""
    area = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    return np.sort(np.argsort(-area, kind="stable")[:most])


def _scale(geometry: Geometry) -> Boxes:
    return np.array(
        [geometry.scale_x, geometry.scale_y, geometry.scale_x, geometry.scale_y], np.float64
    )


def _pad(geometry: Geometry) -> Boxes:
    return np.array([geometry.pad_x, geometry.pad_y, geometry.pad_x, geometry.pad_y], np.float64)
