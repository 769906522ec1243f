"""How a cube is cut: stored chunks, label blocks, and which block is in which split.

Splits are dealt by whole blocks, so that neighbouring pixels stay together; a guard ring of
left-out inner chunks keeps what is learnt from away from what is tested on, and the last dates may
be held out. Everything follows from shapes, shares and the seed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ingest.sources.splits import split_by_size
from warehouse.layouts.cube_geometry import LEFT_OUT, CubeLayout
from warehouse.settings import SPLIT_NAMES

__all__ = ["block_labels", "default_block", "default_shard"]

Box = tuple[int, int, int]
STORED_CHUNK_BYTES = 128 << 20
LEAST_STORED_CHUNKS = 8
LEAST_BLOCKS = 20


def default_shard(inner_grid: Box, inner_bytes: int) -> Box:
    """Inner chunks of a stored chunk along each axis: at most 128 MiB, at least 8 stored chunks
    where the cube allows.

    Halves the longest side of the whole cube until both hold: stored chunks stay as cubic as they
    can.
    """
    shard = list(inner_grid)

    def stored() -> int:
        return math.prod(-(-count // part) for count, part in zip(inner_grid, shard, strict=True))

    while max(shard) > 1 and (
        math.prod(shard) * inner_bytes > STORED_CHUNK_BYTES or stored() < LEAST_STORED_CHUNKS
    ):
        at = shard.index(max(shard))
        shard[at] = -(-shard[at] // 2)
    return shard[0], shard[1], shard[2]


def default_block(inner_grid: Box) -> Box:
    """Inner chunks of a block.

    All dates, and the largest square that gives at least 20 spatial blocks (1 where none does).
    """
    _, rows, columns = inner_grid
    edge = max(
        (
            edge
            for edge in range(1, max(rows, columns) + 1)
            if -(-rows // edge) * -(-columns // edge) >= LEAST_BLOCKS
        ),
        default=1,
    )
    return inner_grid[0], edge, edge


def block_labels(
    inner_grid: Box,
    block: Box,
    shares: dict[str, float],
    seed: int,
    *,
    guard: int = 0,
    held_out: int = 0,
) -> tuple[NDArray[np.uint8], Box]:
    """(labels u1 by block, the block they are by, in inner chunks): 0 train, 1 val, 2 test, 3 left
    out.

    guard: train gives up inner chunks nearer than so many to val or test, val to test. held_out: at
    the last so many inner chunks of time, everything is test, but for the guard. Both make labels
    finer than the blocks splits are dealt by.
    """
    grid = [-(-count // part) for count, part in zip(inner_grid, block, strict=True)]
    names = {"/".join(map(str, at)): at for at in np.ndindex(*grid)}
    sizes = {
        name: math.prod(
            min(part, count - at * part)
            for at, part, count in zip(place, block, inner_grid, strict=True)
        )
        for name, place in names.items()
    }
    labels = np.empty(grid, np.uint8)
    for name, split in split_by_size(sizes, shares, seed).items():
        labels[names[name]] = SPLIT_NAMES.index(split)
    if not guard and not held_out:
        return labels, block
    fine = (1 if held_out else block[0], 1 if guard else block[1], 1 if guard else block[2])
    voxels = CubeLayout((*inner_grid, 1), (1, 1, 1), (1, 1, 1), block).inner_labels(labels)
    if guard:
        voxels = _ring(voxels, guard)
    if held_out:
        voxels[-held_out:] = np.where(
            voxels[-held_out:] == LEFT_OUT, LEFT_OUT, SPLIT_NAMES.index("test")
        )
    return np.ascontiguousarray(voxels[:: fine[0], :: fine[1], :: fine[2]]), fine


def _ring(labels: NDArray[np.uint8], guard: int) -> NDArray[np.uint8]:
    """Left out: every inner chunk with one of a higher label within `guard` steps along y and x."""
    _, rows, columns = labels.shape
    highest = labels.copy()
    tall, wide = min(guard, rows - 1), min(guard, columns - 1)
    for down in range(-tall, tall + 1):
        for right in range(-wide, wide + 1):
            to = (
                slice(max(0, down), rows + min(0, down)),
                slice(max(0, right), columns + min(0, right)),
            )
            of = (
                slice(max(0, -down), rows + min(0, -down)),
                slice(max(0, -right), columns + min(0, -right)),
            )
            highest[:, to[0], to[1]] = np.maximum(highest[:, to[0], to[1]], labels[:, of[0], of[1]])
    return np.where(highest > labels, np.uint8(LEFT_OUT), labels)
