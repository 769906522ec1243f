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


def load_mask(
    record: PictureRecord, root: Path, settings: BuildSettings, geometry: Geometry
) -> NDArray[np.uint8]:
    """uint8 [H, W] on the canvas: classes of `build.mask_values`, MASK_PADDING around the picture.

    Raises PictureError naming the picture: a mask that cannot be read, of another size or with
    values that are not declared.
    """
    import cv2

    assert record.mask is not None
    data = read_inside(root, record.mask, limit=MAX_MASK_BYTES, sha256=record.mask_sha256)
    values = decode_mask(
        data, record.source, record.mask, (record.raw_width, record.raw_height), settings.max_pixels
    )
    classes = classes_of(values, settings.mask_values, record.source, record.mask)
    if (geometry.new_width, geometry.new_height) != (geometry.raw_width, geometry.raw_height):
        classes = cv2.resize(
            classes,
            (geometry.new_width, geometry.new_height),
            interpolation=cv2.INTER_NEAREST_EXACT,
        )
    out = np.full(settings.target_size, MASK_PADDING, np.uint8)
    out[
        geometry.pad_y : geometry.pad_y + geometry.new_height,
        geometry.pad_x : geometry.pad_x + geometry.new_width,
    ] = classes
    return out


def classes_of(
    values: NDArray[np.uint8], mask_values: Mapping[int, int], source: str, mask: str
) -> NDArray[np.uint8]:
    """The class of each value of a mask.

    Raises PictureError (mask_values) naming the picture, for values that are not declared.
    """
    table = np.full(256, MASK_PADDING, np.uint8)
    for value, index in mask_values.items():
        table[value] = index
    classes: NDArray[np.uint8] = table[values]
    if (classes == MASK_PADDING).any():
        strange = sorted(set(np.unique(values).tolist()) - set(mask_values))
        raise PictureError(
            "mask_values",
            where=source,
            expected=f"values {sorted(mask_values)} in {mask}",
            found=strange[:8],
            remedy='declare them: mask_values \'{"0": 0, "255": 1}\'',
        )
    return classes


def decode_mask(
    data: bytes, source: str, name: str, picture_size: tuple[int, int], max_pixels: int
) -> NDArray[np.uint8]:
    """uint8 [height, width], a palette's indices as they are. picture_size: (width, height) of its
    picture `source`.

    Raises PictureError naming the picture: mask_unreadable, mask_size.
    """
    remedy = "save it as an 8 bit grey or palette PNG of its picture's size"
    try:
        image = open_with_pillow(data, name)
        size = image.size
        if size == picture_size and size[0] * size[1] <= max_pixels:
            image.load()
            grey = image.convert("L") if image.mode == "1" else image
            values = np.asarray(grey)
        else:
            raise PictureError(
                "mask_size",
                where=source,
                expected=f"{picture_size[0]} x {picture_size[1]}",
                found=f"{name} with {size[0]} x {size[1]}",
                remedy=remedy,
            )
    except PictureError as error:
        if error.reason == "mask_size":
            raise
        raise PictureError(
            "mask_unreadable", where=source, found=str(error), remedy=remedy
        ) from None
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise PictureError(
            "mask_unreadable", where=source, found=f"{name}: {error}"[:200], remedy=remedy
        ) from None
    if values.dtype != np.uint8 or values.ndim != 2:
        raise PictureError(
            "mask_unreadable", where=source, found=f"{name}: mode {image.mode}", remedy=remedy
        )
    return values
