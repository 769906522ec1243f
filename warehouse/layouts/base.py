"""Where a split's samples lie: sample number -> (stored chunk of the split, row in it), and which
file a stored chunk is.

A split numbers its stored chunks from 0 in the order of its samples. Pictures fill theirs evenly; a
cube's stored chunk may hold samples of several splits, or none of one
(warehouse/layouts/cube_geometry.py). Index arithmetic only, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["EvenPlaces", "Places"]


class Places(Protocol):
    """What a reader must know about a split's stored chunks."""

    @property
    def chunk_sizes(self) -> list[int]:
        """Samples of this split in each of its stored chunks."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first sample of each stored chunk, and of none: [chunks + 1]."""

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(stored chunk of the split, row in it) of each sample."""

    def stored(self, chunk: int) -> int:
        """The stored chunk's number in the array, by which files.parquet knows its file."""

    def present(self, chunk: int) -> int | NDArray[np.int64]:
        """Rows the file holds: the first so many, or these."""


@dataclass(frozen=True, slots=True)
class EvenPlaces:
    """Pictures: `size` samples a stored chunk, the last may hold fewer.

    Files are numbered alike.
    """

    samples: int
    size: int

    @property
    def chunk_sizes(self) -> list[int]:
        full, rest = divmod(self.samples, self.size)
        return [self.size] * full + [rest] * (rest > 0)

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.minimum(
            np.arange(-(-self.samples // self.size) + 1, dtype=np.int64) * self.size, self.samples
        )

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.divmod(indices, self.size)

    def stored(self, chunk: int) -> int:
        return chunk

    def present(self, chunk: int) -> int:
        return min(self.size, self.samples - chunk * self.size)
