"""Blocks of a cube laid out as pictures, so that codecs of pictures see more than one block at a
time.

Label blocks lie below each other, as wide as one: no two columns meet that are no neighbours, rows
do only where one block ends. Dates are an axis of their own. Given up: neighbours across label
blocks of one split, which are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Mosaic", "filled"]


class Mosaic:
    """[time, rows, columns] of blocks. origins: int64 [N, 3] of inner chunks; inner, block: (time,
    y, x) in voxels.

    times: first dates of the inner chunks there are, int64, ascending.
    """

    def __init__(
        self, origins: NDArray[np.int64], inner: Sequence[int], block: Sequence[int]
    ) -> None:
        self.inner = tuple(inner)
        where = origins[:, 1:] // np.array(block[1:])
        _, number = np.unique(where, axis=0, return_inverse=True)
        self.times, step = np.unique(origins[:, 0], return_inverse=True)
        inside = origins[:, 1:] % np.array(block[1:])
        self.corners = np.stack(
            [
                step.reshape(-1) * inner[0],
                number.reshape(-1) * block[1] + inside[:, 0],
                inside[:, 1],
            ],
            axis=1,
        )
        self.block_rows = int(block[1])
        self.shape = (len(self.times) * inner[0], (int(number.max()) + 1) * block[1], int(block[2]))

    def lay(self, blocks: NDArray[Any], fill: Any = 0) -> NDArray[Any]:
        """[N, T, Y, X, C] to [time, rows, columns, C]; `fill` where no block lies."""
        out = np.full((*self.shape, blocks.shape[-1]), fill, blocks.dtype)
        for block, place in zip(blocks, self._places(), strict=True):
            out[place] = block
        return out

    def cut(self, mosaic: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `lay`."""
        return np.stack([mosaic[place] for place in self._places()])

    def _places(self) -> Iterator[tuple[slice, ...]]:
        for corner in self.corners.tolist():
            yield tuple(slice(at, at + size) for at, size in zip(corner, self.inner, strict=True))


def filled(values: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """values, valid: [time, rows, columns, C]; missing values replaced by means of ever wider
    surroundings in their plane (push-pull).

    What stands there is free to choose, and a smooth continuation costs a codec of pictures less
    than a hole with sharp edges. Planes without any valid value become 0.
    """
    if valid.all() or max(values.shape[1:3]) == 1:
        return np.where(valid, values, 0).astype(np.float32)
    time, rows, columns, count = values.shape
    even = ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0))

    def sums(part: NDArray[Any]) -> NDArray[np.float32]:
        whole = np.pad(part, even).astype(np.float32)
        out: NDArray[np.float32] = whole.reshape(
            time, whole.shape[1] // 2, 2, whole.shape[2] // 2, 2, count
        ).sum(axis=(2, 4))
        return out

    number = sums(valid)
    coarse = filled(sums(np.where(valid, values, 0)) / np.maximum(number, 1), number > 0)
    around = coarse.repeat(2, axis=1).repeat(2, axis=2)[:, :rows, :columns]
    return np.where(valid, values, around).astype(np.float32)
