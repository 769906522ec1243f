"""Decoding masks: an image file whose values say which class each pixel of its picture has.

`build.mask_values` declares which value means which class: 0/255 files declared as 0/1 are refused,
not guessed. Masks are resized (nearest) and padded as their pictures are. Given up: colour masks,
masks of more than 8 bits, EXIF orientation of masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.headers import open_with_pillow
from ingest.pictures.letterbox import Geometry
from ingest.records.base import PictureRecord
from ingest.sources.files import read_inside
from warehouse.errors import PictureError
from warehouse.settings import MASK_PADDING, BuildSettings

__all__ = ["classes_of", "decode_mask", "load_mask"]

MAX_MASK_BYTES = 1 << 30
SAVE_AGAIN = "save it as an 8 bit grey or palette PNG of its picture's size"


def load_mask(
    record: PictureRecord, root: Path, settings: BuildSettings, geometry: Geometry
) -> NDArray[np.uint8]:
    """Decode a picture's mask and place it on the canvas.

    Returns
    -------
    NDArray
        uint8 [H, W]: classes of `build.mask_values`, MASK_PADDING around the picture.

    Raises
    ------
    PictureError
        Naming the picture, for a mask that cannot be read, has another size, or holds values that
        are not declared.
    """
    import cv2

    assert record.mask is not None
    data = read_inside(root, record.mask, limit=MAX_MASK_BYTES, sha256=record.mask_sha256)
    size = record.raw_width, record.raw_height
    values = decode_mask(data, record.source, record.mask, size, settings.max_pixels)
    classes = classes_of(values, settings.mask_values, record.source, record.mask)
    # Classes are looked up before resizing: of a value that is not declared no pixel may be lost,
    # even where the smaller mask would skip it.
    new_size = geometry.new_width, geometry.new_height
    if new_size != size:
        # The same pixels as Pillow's nearest filter; OpenCV's plain one rounds differently.
        classes = cv2.resize(classes, new_size, interpolation=cv2.INTER_NEAREST_EXACT)
    out = np.full(settings.target_size, MASK_PADDING, np.uint8)
    bottom, right = geometry.pad_y + geometry.new_height, geometry.pad_x + geometry.new_width
    out[geometry.pad_y : bottom, geometry.pad_x : right] = classes
    return out


def classes_of(
    values: NDArray[np.uint8], mask_values: Mapping[int, int], source: str, mask: str
) -> NDArray[np.uint8]:
    """Return the class of each value of a mask.

    Parameters
    ----------
    values
        uint8 [height, width], as decoded.
    mask_values
        Value in the file -> class.
    source, mask
        Paths of the picture and of its mask, for messages.

    Raises
    ------
    PictureError
        With the reason `mask_values`, for values that are not declared.
    """
    # One table lookup for all pixels. No declared class may be MASK_PADDING, so that it marks what
    # was not declared.
    table = np.full(256, MASK_PADDING, np.uint8)
    for value, index in mask_values.items():
        table[value] = index
    classes: NDArray[np.uint8] = table[values]
    if (classes == MASK_PADDING).any():
        undeclared = sorted(set(np.unique(values).tolist()) - set(mask_values))
        raise PictureError(
            "mask_values",
            where=source,
            expected=f"values {sorted(mask_values)} in {mask}",
            found=undeclared[:8],
            remedy='declare them: mask_values \'{"0": 0, "255": 1}\'',
        )
    return classes


def decode_mask(
    data: bytes, source: str, name: str, picture_size: tuple[int, int], max_pixels: int
) -> NDArray[np.uint8]:
    """Decode a mask.

    Parameters
    ----------
    source, name
        Paths of the picture and of its mask, for messages.
    picture_size
        Width and height of the picture.
    max_pixels
        The largest number of pixels that is decoded.

    Returns
    -------
    NDArray
        uint8 [height, width]: grey values, or a palette's indices as they are.

    Raises
    ------
    PictureError
        Naming the picture, with the reason `mask_unreadable` or `mask_size`.
    """
    try:
        image = open_with_pillow(data, name)
    except PictureError as error:
        raise _unreadable(source, str(error)) from None
    size = image.size
    # Compared before decoding, so that a small file cannot claim a huge mask.
    if size != picture_size or size[0] * size[1] > max_pixels:
        raise PictureError(
            "mask_size",
            where=source,
            expected=f"{picture_size[0]} x {picture_size[1]}",
            found=f"{name} with {size[0]} x {size[1]}",
            remedy=SAVE_AGAIN,
        )
    try:
        image.load()
        # One-bit masks become 0 and 255, as other programs show them. Palette indices stay as they
        # are: their colours mean nothing.
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise _unreadable(source, f"{name}: {error}"[:200]) from None
    if values.dtype != np.uint8 or values.ndim != 2:
        raise _unreadable(source, f"{name}: mode {image.mode}")
    return values


def _unreadable(source: str, found: str) -> PictureError:
    return PictureError("mask_unreadable", where=source, found=found, remedy=SAVE_AGAIN)
