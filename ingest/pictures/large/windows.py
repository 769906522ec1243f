"""Any part of a picture without the rest: TIFF files by window, others decoded once and kept while
they are being cut.

A TIFF of 8 or 16 bits, grey or RGB, not turned, in tiles or strips is read by GDAL window by
window, so that its size does not matter. Every other picture is decoded whole by
`ingest.pictures.images`, within `max_pixels`. Both give the same pixels where both can. Memory: one
decoded picture, or GDAL's block cache (64 MB) and the window asked for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.headers import open_with_pillow
from ingest.pictures.images import MAX_FILE_BYTES, decode_rgb, probe
from ingest.sources.files import path_inside, read_ends, read_inside
from warehouse.errors import PictureError

__all__ = ["Box", "Look", "Windows", "look", "open_windows"]

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, the last two outside."""
CACHE_MB = 64
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")
ORIENTATION, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 262, 0


@dataclass(frozen=True, slots=True)
class Look:
    """What a header says. width, height: turned upright; grey: the file has one channel; windows.

    Read by window, never whole.
    """

    width: int
    height: int
    grey: bool
    windows: bool


def look(root: Path, source: str, *, max_pixels: int) -> Look:
    """Size and kind of a picture below `root`, from its header. max_pixels: of pictures that have
    to be decoded whole.

    Raises PictureError (empty_file, unreadable, truncated, too_large), SourceError.
    """
    head, _, _ = read_ends(root, source, head=256 << 10, tail=1)
    if head.startswith(TIFF_STARTS):
        found = _look_at_tiff(root, source)
        if found is not None:
            return found
    header = probe(root, source, max_pixels=max_pixels)
    try:
        grey = open_with_pillow(head, source).mode in GREY_MODES
    except (
        PictureError
    ):  # the header is longer than what was read: a photograph with a large colour profile
        grey = False
    return Look(header.width, header.height, grey, False)


def _look_at_tiff(root: Path, source: str) -> Look | None:
    """None for a TIFF that is not read by window."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # as in ingest.pictures.headers: sizes are checked by us
    path = path_inside(root, source)
    try:
        with open(path, "rb") as file, Image.open(file, formats=("TIFF",)) as image:
            plain = (
                image.mode in {"L", "I;16", "I;16B", "RGB", "RGBA"}
                and image.tag_v2.get(PHOTOMETRIC) != WHITE_IS_ZERO
            )
            if not plain or image.tag_v2.get(ORIENTATION, 1) != 1:
                return None
            size, grey = image.size, image.mode in GREY_MODES
        with _open(path) as dataset:
            bits = {
                dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8")
                for band in dataset.indexes
            }
            block = int(np.prod(dataset.block_shapes[0])) * np.dtype(dataset.dtypes[0]).itemsize
            if (
                set(dataset.dtypes) <= {"uint8", "uint16"}
                and bits <= {"8", "16"}
                and block <= CACHE_MB << 20
            ):
                return Look(*size, grey, True)
    except (
        Exception
    ):  # whatever Pillow and GDAL raise on hostile bytes: the whole-picture decoder words it
        return None
    return None


@dataclass
class Windows:
    """A picture being cut. grey: one channel of uint8 [h, w] is handed out instead of [h, w, 3].

    Masks are grey.
    """

    source: str
    width: int
    height: int
    pixels: NDArray[np.uint8] | None = None
    dataset: Any = None
    bands: list[int] = field(default_factory=list)

    def read(self, box: Box) -> NDArray[np.uint8]:
        """uint8 [h, w, 3] of a picture, [h, w] of one band.

        Raises PictureError for a file that does not decode there.
        """
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= self.width
        assert 0 <= y1 < y2 <= self.height
        if self.pixels is not None:
            return self.pixels[y1:y2, x1:x2]
        import rasterio
        from rasterio.windows import Window

        try:
            with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
                found = self.dataset.read(self.bands, window=Window(x1, y1, x2 - x1, y2 - y1))
        except Exception as error:
            said = " ".join(str(error).split())[:160]
            raise PictureError(
                "unreadable", where=self.source, found=said, remedy="remove the file or restore it"
            ) from None
        if found.dtype == np.uint16:
            found = ((found.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if len(self.bands) == 1:
            return np.asarray(found[0])
        return np.moveaxis(found, 0, 2)

    def close(self) -> None:
        self.pixels = None
        if self.dataset is not None:
            self.dataset.close()


def open_windows(root: Path, source: str, known: Look, *, sha256: str, max_pixels: int) -> Windows:
    """known: what `look` said. sha256: of the file, checked where it is read whole.

    Raises PictureError, SourceError.
    """
    if known.windows:
        try:
            dataset = _open(path_inside(root, source))
        except Exception as error:
            raise PictureError(
                "unreadable", where=source, found=" ".join(str(error).split())[:160]
            ) from None
        if (dataset.width, dataset.height) != (known.width, known.height):
            raise PictureError(
                "unreadable",
                where=source,
                expected=f"{known.width} x {known.height} pixels",
                found=f"{dataset.width} x {dataset.height}",
            )
        return Windows(
            source,
            known.width,
            known.height,
            dataset=dataset,
            bands=[1] if known.grey else [1, 2, 3],
        )
    data = read_inside(root, source, limit=MAX_FILE_BYTES, sha256=sha256)
    pixels, _ = decode_rgb(data, name=source, max_pixels=max_pixels)
    return Windows(
        source, known.width, known.height, pixels=pixels[:, :, 0].copy() if known.grey else pixels
    )


def _open(path: str) -> Any:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, driver="GTiff")
