"""Pictures from files as a model sees them: decoded, and letterboxed as a build would."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.images import MAX_FILE_BYTES, decode_rgb, letterbox_into, plan_letterbox
from ingest.sources.files import PICTURE_EXTENSIONS, read_inside
from warehouse.errors import SourceError

__all__ = ["Canvas", "PictureBatch", "find_pictures", "read_pictures"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Canvas:
    """What a picture is letterboxed onto.

    Parameters
    ----------
    size
        Height and width in pixels.
    pad_value
        Grey value of the padding.
    resize_mode
        `letterbox` or `stretch`.
    """

    size: tuple[int, int]
    pad_value: int
    resize_mode: str


@dataclass(slots=True)
class PictureBatch:
    """Pictures that were decoded together; the lists have one entry for each.

    Parameters
    ----------
    names
        Paths relative to the root.
    pictures
        As decoded, uint8 [h, w, 3] RGB.
    canvases
        Letterboxed, uint8 [3, H, W].
    letterboxes
        float32 [6], the columns of warehouse.format.schema.GEOMETRY.
    """

    names: list[str] = field(default_factory=list)
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    canvases: list[NDArray[np.uint8]] = field(default_factory=list)
    letterboxes: list[NDArray[np.float32]] = field(default_factory=list)


def find_pictures(source: Path, limit: int) -> tuple[Path, list[str]]:
    """The root and the relative paths of a picture, or of the pictures below a folder.

    Raises
    ------
    SourceError
        If there is no such file or folder, or no picture in it.
    """
    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise SourceError(
            "no such picture, folder or warehouse",
            where=source,
            remedy="name one with --infer.input",
        )
    # Sorted, since the order of a directory differs between file systems and a limit would show
    # others.
    found = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in PICTURE_EXTENSIONS and path.is_file()
    )
    if not found:
        raise SourceError(
            "no pictures found",
            where=source,
            remedy="name a picture, a folder of pictures or a warehouse with --infer.input",
        )
    if len(found) > limit:
        log.warning(
            "showing the first %d of %d pictures; --infer.limit shows more", limit, len(found)
        )
    return source, [path.relative_to(source).as_posix() for path in found[:limit]]


def read_pictures(
    source: Path, canvas: Canvas, *, limit: int, batch_size: int, max_pixels: int
) -> Iterator[PictureBatch]:
    """Decode and letterbox a picture, or those below a folder.

    A picture among others that cannot be decoded is left out with a warning.

    Parameters
    ----------
    limit
        The largest number of pictures.
    max_pixels
        A picture that declares more is refused before it is decoded.

    Raises
    ------
    SourceError
        If there is nothing to read, or the only picture cannot be decoded.
    """
    root, paths = find_pictures(source, limit)
    for start in range(0, len(paths), batch_size):
        batch = PictureBatch()
        for path in paths[start : start + batch_size]:
            try:
                encoded = read_inside(root, path, limit=MAX_FILE_BYTES)
                picture, _ = decode_rgb(encoded, name=path, max_pixels=max_pixels)
            except SourceError as error:
                # With nothing else to show, a warning and an empty page would hide the cause.
                if len(paths) == 1:
                    raise
                log.warning("left out: %s", error)
                continue
            _add(batch, path, picture, canvas)
        if batch.names:
            yield batch


def _add(batch: PictureBatch, name: str, picture: NDArray[np.uint8], canvas: Canvas) -> None:
    height, width = picture.shape[:2]
    geometry = plan_letterbox(width, height, canvas.size, canvas.resize_mode)
    out = np.empty((3, *canvas.size), np.uint8)
    letterbox_into(picture, geometry, out, canvas.pad_value)
    batch.names.append(name)
    batch.pictures.append(picture)
    batch.canvases.append(out)
    batch.letterboxes.append(geometry.row())
