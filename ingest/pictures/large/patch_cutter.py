"""Cutting patches of large pictures and of their masks.

Whoever cuts knows the boxes: nothing here knows how patches lie. A picture stays open until a patch
of another one is asked for. Patches come in the order of their pictures, so each picture is decoded
once. Memory: one decoded picture and its mask, or GDAL's block cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.images import MAX_FILE_BYTES, decoder_versions
from ingest.pictures.large.survey import Parent
from ingest.pictures.large.windows import Box, Windows, open_windows
from ingest.pictures.mask_decoding import classes_of, decode_mask
from ingest.sources.files import read_inside
from warehouse.errors import PictureError
from warehouse.settings import MASK_PADDING

__all__ = ["PatchCutter", "cut_versions"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""


def cut_versions() -> dict[str, str]:
    """Return name and version of what decodes pictures and cuts them."""
    return decoder_versions() | {"rasterio": version("rasterio")}


@dataclass
class PatchCutter:
    """The `load` function of a build of patches: (picture, box) -> the patch.

    Attributes
    ----------
    root
        The input root.
    channels
        1 or 3. A colour picture as one channel is its luma; a grey one as three is repeated.
    mask_values
        Class of each value in the mask files.
    max_pixels
        The largest size of a picture that has to be decoded whole.
    decoded
        Number of pictures opened so far.
    """

    root: Path
    channels: int
    mask_values: Mapping[int, int]
    max_pixels: int
    decoded: int = 0
    _held: threading.local = field(default_factory=threading.local)

    def __call__(
        self, payload: tuple[Parent, Box]
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, float]]:
        """Cut one patch.

        Returns
        -------
        tuple
            `image`, uint8 [channels, h, w], and `mask`, uint8 [h, w], classes, with MASK_PADDING
            where the picture has no mask; and the seconds of each stage.

        Raises
        ------
        PictureError
            Naming the picture, for a file that cannot be read or a mask value that is not declared.
        """
        parent, box = payload
        start = time.perf_counter()
        picture, mask = self._open(parent)
        opened = time.perf_counter()
        found = picture.read(box)
        image = self._channels(found)
        if mask is None:
            classes = np.full(found.shape[:2], MASK_PADDING, np.uint8)
        else:
            assert parent.mask is not None
            classes = classes_of(mask.read(box), self.mask_values, parent.source, parent.mask)
        return {"image": image, "mask": classes}, {
            "decode": opened - start,
            "read": time.perf_counter() - opened,
        }

    def _channels(self, found: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if found.ndim == 2:
            return np.repeat(found[None], self.channels, axis=0)
        if self.channels == 3:
            return np.ascontiguousarray(np.moveaxis(found, 2, 0))
        # Adding one half rounds to nearest, where the cast alone would darken every pixel.
        return (found @ LUMA + np.float32(0.5)).astype(np.uint8)[None]

    def _open(self, parent: Parent) -> tuple[Windows, Windows | None]:
        # One picture for each thread: a second open one could double the memory, and patches are
        # sorted by picture anyway.
        if getattr(self._held, "source", None) != parent.source:
            self._close()
            self.decoded += 1
            picture = open_windows(
                self.root,
                parent.source,
                parent.header,
                sha256=parent.sha256,
                max_pixels=self.max_pixels,
            )
            self._held.source, self._held.pair = parent.source, (picture, self._open_mask(parent))
        pair: tuple[Windows, Windows | None] = self._held.pair
        return pair

    def _open_mask(self, parent: Parent) -> Windows | None:
        if parent.mask is None:
            return None
        assert parent.mask_header is not None
        assert parent.mask_sha256 is not None
        # A mask of many gigapixels is read by windows like its picture. Other kinds, such as
        # palettes, are decoded by Pillow, so that their values are those of small masks.
        if parent.mask_header.by_window and parent.mask_header.grey:
            found = open_windows(
                self.root,
                parent.mask,
                parent.mask_header,
                sha256=parent.mask_sha256,
                max_pixels=self.max_pixels,
            )
            if found.dataset.dtypes[0] != "uint8":
                raise PictureError(
                    "mask_unreadable",
                    where=parent.source,
                    expected=f"8 bits in {parent.mask}",
                    found=found.dataset.dtypes[0],
                )
            return found
        data = read_inside(self.root, parent.mask, limit=MAX_FILE_BYTES, sha256=parent.mask_sha256)
        values = decode_mask(
            data, parent.source, parent.mask, (parent.width, parent.height), self.max_pixels
        )
        # The whole mask is at hand, so that undeclared values are found wherever they are.
        classes_of(values, self.mask_values, parent.source, parent.mask)
        return Windows(parent.mask, parent.width, parent.height, pixels=values)

    def _close(self) -> None:
        for windows in getattr(self._held, "pair", ()):
            if windows is not None:
                windows.close()
        self._held.source = None

    def __getstate__(self) -> dict[str, Any]:
        # Neither open files nor thread-local storage can be pickled for a worker process.
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _held=threading.local())
