"""Placing a picture on a canvas of fixed size: the geometry, and the pixels.

canvas = source * scale + pad, in pixels whose corners lie at integers. Each axis has its true scale
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
    """Where a picture lies on its canvas.

    Attributes
    ----------
    scale_x, scale_y
        Canvas pixels per source pixel.
    pad_x, pad_y
        Canvas pixels to the left of the picture and above it.
    raw_width, raw_height
        Size of the picture as shown, in source pixels.
    new_width, new_height
        Size of the picture in canvas pixels.
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
        """A row of the array `letterbox`: float32 [6], `warehouse.format.schema.GEOMETRY`."""
        return np.array(astuple(self)[:6], np.float32)


def plan_letterbox(
    raw_width: int, raw_height: int, target_size: tuple[int, int], mode: str
) -> Geometry:
    """Compute where a picture lies on a canvas.

    Parameters
    ----------
    raw_width, raw_height
        Size of the picture as shown, in pixels.
    target_size
        Height and width of the canvas.
    mode
        `letterbox` keeps the aspect ratio to the nearest pixel, enlarges small pictures, and
        centres; an odd rest goes right and down. `stretch` fills the whole canvas.
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
    """Write a picture and its border into a canvas.

    Parameters
    ----------
    picture
        uint8 [h, w, 3] RGB, as shown.
    out
        The canvas, [3, H, W] of `dtype`: uint8 takes values in [0, 255], floats in [0, 1].
    pad_value
        Value of the border, 0 to 255.
    """
    assert picture.shape == (geometry.raw_height, geometry.raw_width, 3)
    assert out.dtype == np.dtype(dtype)
    small = _resize(picture, geometry.new_width, geometry.new_height)
    top, left = geometry.pad_y, geometry.pad_x
    bottom, right = top + geometry.new_height, left + geometry.new_width
    inside = out[:, top:bottom, left:right]
    if out.dtype == np.uint8:
        border: int | np.float32 = pad_value
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
    import cv2

    # Its own threads would compete with the build's other workers for the same cores.
    cv2.setNumThreads(1)
    return cv2
