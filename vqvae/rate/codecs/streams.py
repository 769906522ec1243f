"""Arrays as Blosc-zstd buffers, the way the store packs codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray

__all__ = ["mask_bytes", "zstd_pack", "zstd_unpack"]

GROUP = 256
"""Blocks in one buffer, as in a stored chunk of codes."""

MOST_BYTES = 1 << 30
"""Blosc takes less than 2 GiB at a time."""


def zstd_pack(rows: NDArray[Any]) -> list[bytes]:
    """Compress groups of rows, with the last axis (features) first.

    Parameters
    ----------
    rows
        Any type, [N, ..., C].

    Returns
    -------
    list of bytes
        Shuffled by bytes or by bits, whichever is smaller in all.
    """
    size = rows.dtype.itemsize
    groups = [
        # Features first: shuffled bytes are most alike within one feature.
        np.ascontiguousarray(np.moveaxis(rows[first : first + GROUP], -1, 0))
        for first in range(0, len(rows), GROUP)
    ]
    flat = [group.view(np.uint8).reshape(-1) for group in groups]
    pieces = [
        each[start : start + MOST_BYTES]
        for each in flat
        for start in range(0, each.size, MOST_BYTES)
    ]

    # Neither shuffle is better for all codecs, and each is to be judged by its best.
    by_bytes, by_bits = int(size > 1), 2
    candidates = [
        [blosc.compress(piece, b"zstd", 9, shuffle, 0, size) for piece in pieces]
        for shuffle in (by_bytes, by_bits)
    ]
    return min(candidates, key=lambda streams: sum(map(len, streams)))


def zstd_unpack(streams: Sequence[bytes], dtype: DTypeLike, shape: Sequence[int]) -> NDArray[Any]:
    """Return the array that `zstd_pack` compressed."""
    flat = np.frombuffer(b"".join(map(blosc.decompress, streams)), dtype)
    out = np.empty(shape, dtype)

    start = 0
    for first in range(0, len(out), GROUP):
        rows = out[first : first + GROUP]
        group = flat[start : start + rows.size]
        features_first = group.reshape(shape[-1], len(rows), *shape[1:-1])
        rows[:] = np.moveaxis(features_first, 0, -1)
        start += rows.size
    return out


def mask_bytes(valid: NDArray[np.bool_]) -> int:
    """Return the bytes of `valid` [N, T, Y, X, C] as packed bits, compressed as beside codes."""
    bits = np.packbits(valid.reshape(len(valid), -1), axis=1)
    # Charged to every codec: without it the decoder would not know which values are missing.
    return sum(map(len, zstd_pack(bits)))
