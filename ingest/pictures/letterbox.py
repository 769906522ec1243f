"""A picture onto a canvas of fixed size: the geometry, and the pixels.

canvas = source * scale + pad, in pixels with corners at integers, each axis with its true scale
(new / raw), so that a box follows its pixels exactly although the new size is rounded. Shrinking
averages areas, enlarging interpolates linearly; a stretch that does both does one after the other.
Given up: sharper (Lanczos) filters, at several times the cost.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Geometry", "letterbox_into", "plan_letterbox"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The columns of `letterbox` (warehouse.format.schema.GEOMETRY), then the size in pixels that
    the picture has on the canvas.
    """

    scale_x: float
    scale_y: float
    pad_x: int
    pad_y: int
    raw_width: int
    raw_height: int
    new_width: int
    new_height: int

    def row(self) -> NDArray[np.float32]:
        """float32 [6]: scale_x, scale_y, pad_x, pad_y, raw_width, raw_height."""
        return np.array(astuple(self)[:6], np.float32)


def plan_letterbox(
    raw_width: int, raw_height: int, target_size: tuple[int, int], mode: str
) -> Geometry:
    """Where a picture of the given oriented size lies on a canvas of `target_size` (H, W).

    mode `letterbox`: aspect kept to the nearest pixel, centred (an odd rest goes right and down),
    enlarged where smaller; `stretch`: the whole canvas.
    """
    height, width = target_size
    new_width, new_height = width, height
    if mode == "letterbox":
        # In integers: the side that fits exactly must not lose a pixel to rounding.
        if width * raw_height <= height * raw_width:
            new_height = max(1, (2 * raw_height * width + raw_width) // (2 * raw_width))
        else:
            new_width = max(1, (2 * raw_width * height + raw_height) // (2 * raw_height))
    pad_x, pad_y = (width - new_width) // 2, (height - new_height) // 2
    return Geometry(
        new_width / raw_width,
        new_height / raw_height,
        pad_x,
        pad_y,
        raw_width,
        raw_height,
        new_width,
        new_height,
    )


def letterbox_into(
    picture: NDArray[np.uint8],
    geometry: Geometry,
    out: NDArray[Any],
    pad_value: int,
    dtype: str = "uint8",
) -> None:
    """Write `picture` (uint8 [h, w, 3], oriented) into the canvas `out` ([3, H, W], of `dtype`),
    border included.

    uint8 canvases carry [0, 255]; float16 and float32 ones value / 255.
    """
    assert picture.shape == (geometry.raw_height, geometry.raw_width, 3)
    assert out.dtype == np.dtype(dtype)
    small = _resize(picture, geometry.new_width, geometry.new_height)
    top, left = geometry.pad_y, geometry.pad_x
    bottom, right = top + geometry.new_height, left + geometry.new_width
    inside = out[:, top:bottom, left:right]
    if out.dtype == np.uint8:
        border: Any = pad_value
        # Six times as fast as a transposed copy by NumPy.
        _single_threaded_cv2().split(small, list(inside))
    else:
        border = np.float32(pad_value) / np.float32(255)
        np.copyto(
            inside,
            small.transpose(2, 0, 1).astype(np.float32) / np.float32(255),
            casting="same_kind",
        )
    out[:, :top] = border
    out[:, bottom:] = border
    out[:, top:bottom, :left] = border
    out[:, top:bottom, right:] = border


def _resize(picture: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    cv2 = _single_threaded_cv2()
    raw_height, raw_width = picture.shape[:2]
    if (width, height) == (raw_width, raw_height):
        return picture
    # OpenCV's area filter silently becomes a linear one as soon as one axis grows.
    shrunk = min(width, raw_width), min(height, raw_height)
    if shrunk != (raw_width, raw_height):
        picture = cv2.resize(picture, shrunk, interpolation=cv2.INTER_AREA)
    if shrunk != (width, height):
        picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
    return picture


@cache
def _single_threaded_cv2() -> Any:
    """OpenCV, imported where first needed.

    Its own threads would fight with the build's other workers.
    """
    import cv2

    cv2.setNumThreads(1)
    return cv2
