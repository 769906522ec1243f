"""What a file is, how large and how turned, from its first bytes.

No pixel is decoded and nothing is allocated, so a header that claims 100,000 x 100,000 pixels costs
nothing. The content decides, never the extension. JPEG markers and the EXIF orientation are read
here, with bounds; the headers of the other formats by Pillow, which is restricted to them.
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
SHORT = 3
"""EXIF's number for the type of the orientation."""
# JPEG markers, ITU T.81, table B.1.
STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
FRAME_MARKERS = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
END_MARKERS = frozenset({0xD9, 0xDA})
APP1 = 0xE1


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says.

    Attributes
    ----------
    width, height
        Size in pixels after EXIF orientation, which is the picture as shown.
    raw_width, raw_height
        Size in pixels as stored.
    orientation
        EXIF orientation, 1 to 8.
    kind
        One of FORMATS.
    """

    width: int
    height: int
    raw_width: int
    raw_height: int
    orientation: int
    kind: str


def read_header(data: bytes, name: str) -> Header:
    """Read the header of a picture.

    Parameters
    ----------
    data
        The file, or its first bytes.
    name
        The picture's path, for messages.

    Raises
    ------
    PictureError
        With the reason `empty_file`, `unreadable` or `truncated`.
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
    """Open a picture without decoding its pixels.

    Returns
    -------
    PIL.Image.Image
        A picture of one of FORMATS. Its type is not declared, because importing Pillow takes long.

    Raises
    ------
    PictureError
        With the reason `unreadable`.
    """
    from PIL import Image

    # Sizes are checked by us, against `max_pixels` and before anything is allocated; Pillow's own
    # limit only warns in between.
    Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # Pillow's readers raise anything on hostile bytes
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if type(error).__name__ == "UnidentifiedImageError":
            found = f"neither {', '.join(FORMATS[:-1])} nor {FORMATS[-1]}"
        raise PictureError(
            "unreadable", where=name, found=found, remedy="remove the file or restore it"
        ) from None


def ends_cleanly(kind: str, tail: bytes) -> bool:
    """Whether the last bytes of a file are those of a complete picture.

    False only means that the picture has to be decoded to find out.
    """
    if kind == "JPEG":
        # Zeros after the end marker do no harm.
        return tail.rstrip(b"\0").endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    return False


def exif_orientation(exif: bytes) -> int:
    """Read the orientation in an EXIF block (CIPA DC-008).

    Parameters
    ----------
    exif
        The block, with or without its `Exif` prefix.

    Returns
    -------
    int
        1 to 8; 1 where the tag is absent or the block is damaged.
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
        if tag == ORIENTATION_TAG and kind == SHORT:
            return _valid(struct.unpack_from(order + "H", tiff, start + 8)[0])
    return 1


def _valid(orientation: Any) -> int:
    return orientation if orientation in range(1, 9) else 1


def _jpeg_header(data: bytes, name: str) -> tuple[int, int, int]:
    """Read width and height as stored, and orientation, before the first scan.

    The markers are those of annex B of ITU-T T.81.
    """
    at, orientation = 2, 1
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            # A fill byte before a marker (B.1.1.2).
            at += 1
            continue
        if marker in STANDALONE_MARKERS:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if marker == APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 4 : at + 2 + length])
        if marker in FRAME_MARKERS:
            if at + 9 > len(data):
                break
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height, orientation
        if marker in END_MARKERS or length < 2:
            break
        at += 2 + length
    raise PictureError(
        "truncated",
        where=name,
        found="a JPEG without a frame header",
        remedy="remove the file or restore it",
    )
