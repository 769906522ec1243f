"""Any part of a picture without the rest.

A TIFF of 8 or 16 bits, grey or RGB, not turned, in tiles or strips is read by GDAL window by
window, so that its size does not matter. Every other picture is decoded whole by
`ingest.pictures.images`, within `max_pixels`, and kept while it is being cut. Both give the same
pixels where both can. Memory: one decoded picture, or GDAL's block cache (64 MB) and the window
asked for.
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

__all__ = ["Box", "PictureHeader", "Windows", "open_windows", "read_window_header"]

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, the last two outside."""
CACHE_MB = 64
HEAD_BYTES = 256 << 10
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""TIFF and BigTIFF, in both byte orders."""
WINDOW_MODES = ("L", "I;16", "I;16B", "RGB", "RGBA")
GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")
ORIENTATION, PHOTOMETRIC, WHITE_IS_ZERO = 0x0112, 262, 0


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """What a header says.

    Attributes
    ----------
    width, height
        Size in pixels, turned upright.
    grey
        Whether the file has one channel.
    by_window
        Whether the file is read by window, and so never decoded whole.
    """

    width: int
    height: int
    grey: bool
    by_window: bool


def read_window_header(root: Path, source: str, *, max_pixels: int) -> PictureHeader:
    """Read size and kind of a picture below a root.

    Parameters
    ----------
    max_pixels
        The largest size of a picture that has to be decoded whole.

    Raises
    ------
    PictureError
        With the reason `empty_file`, `unreadable`, `truncated` or `too_large`.
    SourceError
        If the file cannot be read.
    """
    head, _, _ = read_ends(root, source, head=HEAD_BYTES, tail=1)
    if head.startswith(TIFF_STARTS):
        found = _tiff_header(root, source)
        if found is not None:
            return found
    header = probe(root, source, max_pixels=max_pixels)
    try:
        grey = open_with_pillow(head, source).mode in GREY_MODES
    except PictureError:
        # The header is longer than what was read, as of a photograph with a large colour profile.
        grey = False
    return PictureHeader(header.width, header.height, grey, by_window=False)


def _tiff_header(root: Path, source: str) -> PictureHeader | None:
    """None for a TIFF that is not read by window."""
    from PIL import Image
    from PIL.TiffImagePlugin import TiffImageFile

    Image.MAX_IMAGE_PIXELS = None  # as in ingest.pictures.headers: sizes are checked by us
    path = path_inside(root, source)
    try:
        with open(path, "rb") as file, Image.open(file, formats=("TIFF",)) as image:
            assert isinstance(image, TiffImageFile)
            inverted = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
            turned = image.tag_v2.get(ORIENTATION, 1) != 1
            if image.mode not in WINDOW_MODES or inverted or turned:
                return None
            size, grey = image.size, image.mode in GREY_MODES
        with _open(path) as dataset:
            if _reads_by_window(dataset):
                return PictureHeader(*size, grey, by_window=True)
    except Exception:
        # Pillow and GDAL raise anything on hostile bytes. Decoding the whole picture fails in the
        # same place, with an error that says what is wrong.
        return None
    return None


def _reads_by_window(dataset: Any) -> bool:
    bits = {dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in dataset.indexes}
    block = int(np.prod(dataset.block_shapes[0])) * np.dtype(dataset.dtypes[0]).itemsize
    is_plain = set(dataset.dtypes) <= {"uint8", "uint16"} and bits <= {"8", "16"}
    # A block larger than the cache, such as one strip of the whole file, would be decoded again
    # for every window.
    return is_plain and block <= CACHE_MB << 20


@dataclass
class Windows:
    """A picture that is being cut.

    Attributes
    ----------
    source
        POSIX path relative to the input root.
    width, height
        Size in pixels.
    pixels
        The decoded picture, uint8 [height, width, 3] or [height, width]; None where it is read by
        window.
    dataset
        The open GDAL dataset; None where the picture is decoded.
    bands
        The bands that are read by window: one of a grey picture, three of a coloured one.
    """

    source: str
    width: int
    height: int
    pixels: NDArray[np.uint8] | None = None
    dataset: Any = None
    bands: list[int] = field(default_factory=list)

    def read(self, box: Box) -> NDArray[np.uint8]:
        """Read a part.

        Returns
        -------
        NDArray
            uint8 [h, w, 3], or [h, w] of a grey picture.

        Raises
        ------
        PictureError
            For a file that cannot be decoded there.
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
            raise PictureError(
                "unreadable",
                where=self.source,
                found=_one_line(error),
                remedy="remove the file or restore it",
            ) from None
        if found.dtype == np.uint16:
            # Rounded from 0..65535 to 0..255, as `ingest.pictures.images` does.
            found = ((found.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if len(self.bands) == 1:
            return np.asarray(found[0])
        return np.moveaxis(found, 0, 2)

    def close(self) -> None:
        """Free the pixels, or close the file."""
        self.pixels = None
        if self.dataset is not None:
            self.dataset.close()


def open_windows(
    root: Path, source: str, known: PictureHeader, *, sha256: str, max_pixels: int
) -> Windows:
    """Open a picture for cutting.

    Parameters
    ----------
    known
        What `read_window_header` found.
    sha256
        Digest of the file, which is checked where the file is read whole.

    Raises
    ------
    PictureError, SourceError
        For a file that cannot be read, or that has changed.
    """
    if not known.by_window:
        data = read_inside(root, source, limit=MAX_FILE_BYTES, sha256=sha256)
        pixels, _ = decode_rgb(data, name=source, max_pixels=max_pixels)
        if known.grey:
            # A copy, so that the other two channels are freed.
            pixels = pixels[:, :, 0].copy()
        return Windows(source, known.width, known.height, pixels=pixels)
    try:
        dataset = _open(path_inside(root, source))
    except Exception as error:
        raise PictureError("unreadable", where=source, found=_one_line(error)) from None
    if (dataset.width, dataset.height) != (known.width, known.height):
        raise PictureError(
            "unreadable",
            where=source,
            expected=f"{known.width} x {known.height} pixels",
            found=f"{dataset.width} x {dataset.height}",
        )
    bands = [1] if known.grey else [1, 2, 3]
    return Windows(source, known.width, known.height, dataset=dataset, bands=bands)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _open(path: str) -> Any:
    import rasterio

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, driver="GTiff")
