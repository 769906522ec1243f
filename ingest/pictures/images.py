"""From encoded bytes to RGB pixels, and on to one sample of the store.

Whatever a picture is (grey, palette, CMYK, 16 bit, turned by EXIF), out comes uint8 RGB as a viewer
shows it, or a PictureError; never part of a picture. JPEG goes through libjpeg-turbo in strict
mode, the rest through Pillow. Transparency is dropped, not composited: there is no background to
assume. Of an animation the first frame counts. Given up: 16-bit colour (not grey) keeps its high
byte only, as Pillow reads it; float and 32-bit samples are refused.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.box_cleaning import to_canvas
from ingest.pictures.headers import Header, ends_cleanly, open_with_pillow, read_header
from ingest.pictures.letterbox import Geometry, letterbox_into, plan_letterbox
from ingest.pictures.mask_decoding import load_mask
from ingest.records.base import PictureRecord
from ingest.sources.files import read_ends, read_inside
from warehouse.errors import PictureError
from warehouse.settings import BuildSettings

__all__ = [
    "MAX_FILE_BYTES",
    "Geometry",
    "decode_rgb",
    "decoder_versions",
    "letterbox_into",
    "load_sample",
    "plan_letterbox",
    "preload",
    "probe",
    "read_header",
]

MAX_FILE_BYTES = 1 << 30
HEAD_BYTES, TAIL_BYTES = 256 << 10, 64
RESTORE = "remove the file or restore it"
CUT_OFF = ("truncated", "premature end", "not enough", "unexpected end", "broken data stream")
"""What libjpeg-turbo and Pillow say of a file that ends too early."""
# Which axes are mirrored, x and y, after the transposition that orientations 5 to 8 need.
FLIPS = {2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}


def decoder_versions() -> dict[str, str]:
    """Return name and version of the libraries that decode and resize pictures.

    They are part of the version key, because another decoder may give other pixels.
    """
    return {name: version(name) for name in ("simplejpeg", "pillow", "opencv-python-headless")}


def preload() -> None:
    """Import decoder and resizer, which takes 0.2 s of a worker's start.

    Otherwise `load_sample` would import them when it is first called.
    """
    import cv2  # noqa: F401
    import simplejpeg  # noqa: F401


def decode_rgb(data: bytes, *, name: str, max_pixels: int) -> tuple[NDArray[np.uint8], int]:
    """Decode a picture.

    Parameters
    ----------
    data
        The whole file.
    name
        The picture's path, for messages.
    max_pixels
        A picture that declares more is refused before anything is allocated.

    Returns
    -------
    tuple
        uint8 [h, w, 3] RGB, turned upright, and the EXIF orientation, 1 to 8, that was applied.

    Raises
    ------
    PictureError
        With the reason `empty_file`, `unreadable`, `truncated` or `too_large`.
    """
    header = read_header(data, name)
    if header.width * header.height > max_pixels:
        raise PictureError(
            "too_large",
            where=name,
            expected=f"at most {max_pixels} pixels",
            found=f"{header.width} x {header.height}",
            remedy="raise --build.max_pixels if the picture is meant to be so large",
        )
    decode = _decode_jpeg if header.kind == "JPEG" else _decode_other
    pixels = decode(data, name, header)
    assert pixels.dtype == np.uint8
    if pixels.shape != (header.height, header.width, 3):
        raise PictureError(
            "unreadable",
            where=name,
            expected=f"{header.width} x {header.height} pixels",
            found=f"{pixels.shape[1]} x {pixels.shape[0]}",
        )
    return pixels, header.orientation


def probe(root: Path, source: str, *, max_pixels: int) -> Header:
    """Read the header of a file, and decode the file only where its end looks cut off.

    Parameters
    ----------
    root
        The input root.
    source
        POSIX path relative to the root.
    max_pixels
        A picture that declares more is refused.

    Raises
    ------
    PictureError
        For the reasons of `decode_rgb`.
    SourceError
        If the file cannot be read.
    """
    head, tail, is_complete = read_ends(root, source, head=HEAD_BYTES, tail=TAIL_BYTES)
    try:
        header = read_header(head, source)
    except PictureError:
        if is_complete:
            raise
        # An embedded thumbnail or colour profile may push the frame header far back.
        header = read_header(read_inside(root, source, limit=MAX_FILE_BYTES), source)
    if header.width * header.height > max_pixels or not ends_cleanly(header.kind, tail):
        data = head if is_complete else read_inside(root, source, limit=MAX_FILE_BYTES)
        decode_rgb(data, name=source, max_pixels=max_pixels)
    return header


def load_sample(
    record: PictureRecord, root: Path, settings: BuildSettings, class_count: int
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Make one sample: a row of each array of `warehouse.format.schema.picture_arrays`.

    Returns
    -------
    tuple
        The arrays by name, and the seconds of the stages `read`, `decode` and `letterbox`.

        ========= ========================================================
        image     `dtype` [3, H, W]
        box       float32 [max_boxes, 4], xyxy normalised to the canvas
        box_mask  bool [max_boxes], true where a slot holds a box
        box_flags uint8 [max_boxes]
        label     int16 [max_boxes], -1 in padded slots
        letterbox float32 [6]
        target    int16 [], of pictures that have a class
        mask      uint8 [H, W], of pictures that have a mask
        ========= ========================================================

    Raises
    ------
    PictureError
        For a picture or mask that cannot be decoded.
    SourceError
        If the file is no longer the one that was planned.
    """
    start = time.perf_counter()
    data = read_inside(root, record.source, limit=MAX_FILE_BYTES, sha256=record.sha256)
    read = time.perf_counter()
    picture, _ = decode_rgb(data, name=record.source, max_pixels=settings.max_pixels)
    decoded = time.perf_counter()

    height, width = settings.target_size
    geometry = plan_letterbox(
        record.raw_width, record.raw_height, settings.target_size, settings.resize_mode
    )
    # Written into place: no second picture of the canvas' size exists.
    image = np.empty((3, height, width), settings.dtype)
    letterbox_into(picture, geometry, image, settings.pad_value, settings.dtype)

    assert not len(record.labels) or int(record.labels.max()) < class_count
    sample = {
        "image": image,
        **_box_rows(record, geometry, settings),
        "letterbox": geometry.row(),
    }
    if record.target is not None:
        sample["target"] = np.array(record.target, np.int16)
    if record.mask is not None:
        sample["mask"] = load_mask(record, root, settings, geometry)
    return sample, {
        "read": read - start,
        "decode": decoded - read,
        "letterbox": time.perf_counter() - decoded,
    }


def _box_rows(
    record: PictureRecord, geometry: Geometry, settings: BuildSettings
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a picture's boxes, padded to `max_boxes` slots."""
    count, slots = len(record.labels), settings.max_boxes
    # The scan has refused pictures with more boxes, or dropped their smallest ones.
    assert count <= slots

    rows: dict[str, NDArray[Any]] = {
        "box": np.zeros((slots, 4), np.float32),
        "box_mask": np.zeros(slots, np.bool_),
        "box_flags": np.zeros(slots, np.uint8),
        "label": np.full(slots, -1, np.int16),
    }
    if count:
        rows["box"][:count] = to_canvas(record.boxes_xyxy, geometry, settings.target_size)
        rows["box_mask"][:count] = True
        rows["box_flags"][:count] = record.flags
        rows["label"][:count] = record.labels
    return rows


def _decode_jpeg(data: bytes, name: str, header: Header) -> NDArray[np.uint8]:
    import simplejpeg

    try:
        colorspace = simplejpeg.decode_jpeg_header(data, strict=False)[2]
        if colorspace not in ("CMYK", "YCCK"):
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
            return _turn(pixels, header.orientation)
    except ValueError as error:
        raise _not_decoded(error, name) from None
    except KeyError:  # simplejpeg looks up a colour space that a header cut short does not give
        raise PictureError(
            "truncated", where=name, found="a JPEG header cut short", remedy=RESTORE
        ) from None
    # libjpeg-turbo does not convert CMYK to RGB.
    return _turn(_convert(open_with_pillow(data, name), name), header.orientation)


def _decode_other(data: bytes, name: str, header: Header) -> NDArray[np.uint8]:
    pixels = _convert(open_with_pillow(data, name), name)
    # Pillow turns TIFF pictures itself.
    return pixels if header.kind == "TIFF" else _turn(pixels, header.orientation)


def _convert(image: Any, name: str) -> NDArray[np.uint8]:
    """uint8 RGB of any Pillow picture."""
    try:
        image.load()
        mode = image.mode
        if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
            # Scaled to 8 bits, because Pillow would clip at 255.
            wide = np.asarray(image).astype(np.uint32)
            grey = ((wide + 128) // 257).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if mode in ("I", "F"):
            raise PictureError(
                "unreadable",
                where=name,
                expected="8 or 16 bits a channel",
                found=f"{mode} samples",
                remedy="convert it to 8 bit",
            )
        if mode in ("P", "PA"):
            # Converting straight to RGB, Pillow warns of a palette's transparency.
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    except PictureError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on hostile bytes
        raise _not_decoded(error, name) from None


def _not_decoded(error: BaseException, name: str) -> PictureError:
    text = " ".join(str(error).split())[:200] or type(error).__name__
    is_cut_off = any(words in text.lower() for words in CUT_OFF)
    reason = "truncated" if is_cut_off else "unreadable"
    return PictureError(reason, where=name, found=text, remedy=RESTORE)


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply an EXIF orientation to [h, w, 3]; the result is contiguous."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flip_x, flip_y = FLIPS[orientation]
    return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
