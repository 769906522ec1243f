"""Boxes: judged, oriented, clipped, and carried between source picture and canvas.

Every box ends up kept or in exactly one list of drops with its reason, in the source's order. The
reasons in BAD are faults of the annotation; `tiny` and `duplicate` are cleaning, and
`over_max_boxes` follows from `too_many_boxes: truncate`. Clipping a box is always done and flagged
only where half a pixel or more was outside: less is rounding of the annotation tool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
Boxes = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CleanBoxes:
    """boxes_xyxy: float64 [n, 4] in source pixels, ordered, inside; labels: int16 [n]; flags.

    Uint8 [n]; dropped: (index, reason).
    """

    boxes_xyxy: Boxes
    labels: NDArray[np.int16]
    flags: NDArray[np.uint8]
    dropped: tuple[tuple[int, str], ...]

    @property
    def clipped(self) -> int:
        return int(np.count_nonzero(self.flags & CLIPPED))


def to_canvas(boxes_xyxy: Boxes, geometry: Geometry, target_size: tuple[int, int]) -> Boxes:
    """Source pixels [n, 4] -> canvas normalised to [0, 1] by (W, H)."""
    height, width = target_size
    return (boxes_xyxy * _scale(geometry) + _pad(geometry)) / np.array(
        [width, height, width, height], np.float64
    )


def orient_boxes(
    boxes_xyxy: Boxes, stored_width: float, stored_height: float, orientation: int
) -> Boxes:
    """Boxes [n, 4] of the picture as stored -> of the picture as shown.

    A reversed box stays reversed, so that it can be told.
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
    """Judge the boxes of one picture. boxes_xyxy: [n, 4] source pixels, anything; class_ids: -1 is
    unknown; size: (width, height).

    A box is dropped for the first of REASONS that holds: not finite; class unknown; x2 < x1 or y2 <
    y1; no area; no part of it inside the picture; under one canvas pixel wide or high; the same
    clipped box and class as one before.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    ids = np.asarray(class_ids, np.int64).reshape(-1)
    bits = np.asarray(flags, np.uint8).reshape(-1).copy()
    count = len(boxes)
    if not count:
        return CleanBoxes(boxes, ids.astype(np.int16), bits, ())
    reason = np.full(count, -1, np.int8)

    def drop(where: Any, name: str) -> None:
        reason[where & (reason < 0)] = REASONS.index(name)

    drop(~np.isfinite(boxes).all(axis=1), "nan")
    drop(ids < 0, "unknown_class")
    whole = np.where(reason[:, None] < 0, boxes, 0.0)
    sides = whole[:, 2:] - whole[:, :2]
    drop((sides < 0).any(axis=1), "reversed")
    drop((sides == 0).any(axis=1), "zero_area")
    limits = np.array([size[0], size[1], size[0], size[1]], np.float64)
    clipped = np.clip(whole, 0.0, limits)
    inner = clipped[:, 2:] - clipped[:, :2]
    drop((inner <= 0).any(axis=1), "outside")
    # The tolerance keeps a box of exactly one canvas pixel, whose side is a quotient of two
    # roundings.
    drop((inner * _scale(geometry)[:2] < 1 - 1e-6).any(axis=1), "tiny")
    seen: set[tuple[float, ...]] = set()
    for at in np.flatnonzero(reason < 0):
        key = (*clipped[at].tolist(), float(ids[at]))
        if key in seen:
            reason[at] = REASONS.index("duplicate")
        seen.add(key)
    bits[(np.abs(whole - clipped) >= CLIP_NOISE_PX).any(axis=1)] |= CLIPPED
    keep = reason < 0
    dropped = tuple((int(at), REASONS[reason[at]]) for at in np.flatnonzero(~keep))
    return CleanBoxes(clipped[keep], ids[keep].astype(np.int16), bits[keep], dropped)


def keep_largest(boxes_xyxy: Boxes, most: int) -> NDArray[np.intp]:
    """Indices of the `most` boxes of largest area, in source order; of equal ones the first."""
    area = (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
    return np.sort(np.argsort(-area, kind="stable")[:most])


def _scale(geometry: Geometry) -> Boxes:
    return np.array(
        [geometry.scale_x, geometry.scale_y, geometry.scale_x, geometry.scale_y], np.float64
    )


def _pad(geometry: Geometry) -> Boxes:
    return np.array([geometry.pad_x, geometry.pad_y, geometry.pad_x, geometry.pad_y], np.float64)
