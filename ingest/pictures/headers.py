"""What a file is, how large and how turned, from its first bytes: no pixel is decoded and nothing
is allocated.

The content decides, never the extension. JPEG markers and the EXIF orientation are read here, with
bounds; the other formats' headers by Pillow, restricted to those formats. Sizes come out before any
buffer is made, so that a header claiming 100,000 x 100,000 pixels costs nothing.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

from warehouse.errors import PictureError

__all__ = [
    "FORMATS",
    "Header",
    "ends_cleanly",
    "exif_orientation",
    "open_with_pillow",
    "read_header",
]

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, slots=True)
class Header:
    """width, height: after EXIF orientation; raw_width, raw_height: as stored; orientation.

    EXIF, 1..8; kind: one of FORMATS.
    """

    width: int
    height: int
    raw_width: int
    raw_height: int
    orientation: int
    kind: str


def read_header(data: bytes, name: str) -> Header:
    """The header of a picture; `data` may be its first bytes only.

    Raises PictureError (empty_file, unreadable) naming `name`.
    """
    if not data:
        raise PictureError(
            "empty_file", where=name, found="0 bytes", remedy="remove the file or restore it"
        )
    if data[:3] == b"\xff\xd8\xff":
        width, height, orientation = _jpeg_header(data, name)
        kind = "JPEG"
    else:
        image = open_with_pillow(data, name)
        (width, height), kind = image.size, str(image.format)
        if kind == "TIFF":
            # Pillow turns TIFF pictures itself and has swapped the size already.
            orientation = _valid(image.tag_v2.get(ORIENTATION_TAG, 1))
            width, height = (height, width) if orientation >= 5 else (width, height)
        else:
            orientation = exif_orientation(image.info.get("exif") or b"")
    if min(width, height) < 1:
        raise PictureError(
            "unreadable", where=name, found=f"a picture of {width} x {height} pixels"
        )
    turned = (height, width) if orientation >= 5 else (width, height)
    return Header(*turned, width, height, orientation, kind)


def open_with_pillow(data: bytes, name: str) -> Any:
    """A lazy `PIL.Image.Image` of one of FORMATS. Raises PictureError (unreadable)."""
    from PIL import Image

    # Sizes are checked by us, against `max_pixels` and before anything is allocated; Pillow's own
    # limit only warns in between.
    Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise anything on hostile bytes
        found = (
            "neither " + ", ".join(FORMATS[:-1]) + f" nor {FORMATS[-1]}"
            if type(error).__name__ == "UnidentifiedImageError"
            else _said(error)
        )
        raise PictureError(
            "unreadable", where=name, found=found, remedy="remove the file or restore it"
        ) from None


def ends_cleanly(kind: str, tail: bytes) -> bool:
    """Whether a file's last bytes are those of a whole picture.

    False only means that the picture has to be decoded to know.
    """
    if kind == "JPEG":
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    return False


def exif_orientation(exif: bytes) -> int:
    """The orientation (1..8) in an EXIF block, with or without its `Exif` prefix.

    1 where absent or out of order (CIPA DC-008).
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if at + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    for start in range(at + 2, min(at + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, start)
        if tag == ORIENTATION_TAG and kind == 3:
            return _valid(struct.unpack_from(order + "H", tiff, start + 8)[0])
    return 1


def _valid(orientation: Any) -> int:
    return orientation if orientation in range(1, 9) else 1


def _jpeg_header(data: bytes, name: str) -> tuple[int, int, int]:
    """Stored width and height, and orientation, from the markers before the first scan (ITU T.81,
    annex B).
    """
    at, orientation = 2, 1
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if (
            marker in (0x01, 0xFF) or 0xD0 <= marker <= 0xD8
        ):  # fill bytes and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 4 : at + 2 + length])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 9 > len(data):
                break
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height, orientation
        if marker in (0xD9, 0xDA) or length < 2:
            break
        at += 2 + length
    raise PictureError(
        "truncated",
        where=name,
        found="a JPEG without a frame header",
        remedy="remove the file or restore it",
    )


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
