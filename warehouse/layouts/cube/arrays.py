"""The Zarr arrays of a cube: `data` and `valid`, and two small ones of splits and valid shares.

Invariant: an array follows from the chunking and the compressor alone, so that two builders of the
same recipe write the same metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from warehouse.format.schema import ArraySpec, Codec
from warehouse.layouts.cube.geometry import CubeChunking

__all__ = ["LABELS", "VALID_SHARE", "SmallArray", "cube_arrays"]


def cube_arrays(
    layout: CubeChunking, compressor: str, samples: int | None = None
) -> list[ArraySpec]:
    """Return `data` and `valid` as readers and the builder see them: [sample, time, y, x, feature].

    Parameters
    ----------
    samples
        Number of samples; None for all that the stored chunks have room for.
    """
    row, part = (*layout.inner, layout.shape[3]), (1, *layout.inner, layout.group)
    cname: Any = None if compressor == "none" else compressor
    level = 5 if cname == "lz4hc" else 9
    # Shuffling whole voxels puts equal bytes of one feature side by side: NAIP images then shrink
    # by a factor of 2.67 instead of 1.77. Blosc keeps the size of an item in one byte.
    typesize = 4 * layout.group if 4 * layout.group <= 255 else 4
    codecs = {
        "data": ("float32", Codec(cname, level, True, typesize)),
        "valid": ("bool", Codec(cname, level, False, 1)),
    }
    count = layout.stored_chunks * layout.slots if samples is None else samples
    return [
        ArraySpec(
            name,
            (count, *row),
            dtype,
            ("sample", "time", "y", "x", "feature"),
            (layout.slots, *row),
            part,
            codec,
            grid=(*layout.shard_grid, 1),
        )
        for name, (dtype, codec) in codecs.items()
    ]


@dataclass(frozen=True, slots=True)
class SmallArray:
    """A small array of a cube, kept in one file.

    Attributes
    ----------
    blocks
        Whether there is a value for each label block; or else there is one for each inner chunk.
    text
        Its `long_name` in the Zarr metadata.
    """

    name: str
    dtype: str
    dims: tuple[str, str, str]
    blocks: bool
    text: str

    def spec(self, layout: CubeChunking) -> ArraySpec:
        """Return the Zarr array, all of which is one stored chunk."""
        shape = layout.block_grid if self.blocks else layout.inner_grid
        itemsize = np.dtype(self.dtype).itemsize
        # Also where the cube is not compressed: it is decoded once, when a split is opened.
        codec = Codec("lz4", 9, itemsize > 1, itemsize)

        return ArraySpec(
            self.name,
            shape,
            self.dtype,
            self.dims,
            shape,
            None,
            codec,
            {"long_name": self.text},
            (1, 1, 1),
        )


LABELS = SmallArray(
    "split",
    "uint8",
    ("block_t", "block_y", "block_x"),
    True,
    "0 train, 1 val, 2 test, 3 left out; one a label block",
)
VALID_SHARE = SmallArray(
    "valid_share",
    "float32",
    ("chunk_t", "chunk_y", "chunk_x"),
    False,
    "share of valid values; one an inner chunk",
)
