"""The sizes of stored chunks and of label blocks, and the split of each block.

Whole blocks are assigned to splits, so that neighbouring pixels stay together. A guard ring of
left-out inner chunks separates training from test blocks, and the last dates may be held out. The
result depends on shapes, shares and the seed alone.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ingest.sources.splits import split_by_size
from warehouse.layouts.cube.geometry import LEFT_OUT, CubeChunking
from warehouse.settings import SPLIT_NAMES

__all__ = ["block_labels", "default_block", "default_shard"]

Box = tuple[int, int, int]
STORED_CHUNK_BYTES = 128 << 20
"""Most bytes of a stored chunk, which each build worker holds in memory, uncompressed."""
LEAST_STORED_CHUNKS = 8
"""Stored chunks that also a small cube is divided into, as far as its inner chunks suffice."""
LEAST_BLOCKS = 20
"""A share of 0.1 is then at least two blocks."""


def default_shard(inner_grid: Box, inner_bytes: int) -> Box:
    """Choose how many inner chunks a stored chunk has along each axis.

    A stored chunk has at most 128 MiB, and there are at least 8 of them where the cube allows. The
    longest side of the whole cube is halved until both hold, so that stored chunks stay as cubic as
    possible.

    Parameters
    ----------
    inner_grid
        Inner chunks of the cube along time, y and x.
    inner_bytes
        Size of an inner chunk in memory.
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
    """Choose how many inner chunks a block has along each axis.

    A block has all dates, and the largest square that gives at least 20 blocks side by side; where
    no square does, it is a single inner chunk wide and high.
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
    """Assign blocks to splits.

    Parameters
    ----------
    inner_grid
        Inner chunks of the cube along time, y and x.
    block
        Inner chunks of a block along the same axes.
    shares
        The share of each split.
    guard
        Training blocks give up inner chunks that are nearer than so many to validation or test
        blocks, and validation blocks those near test blocks.
    held_out
        Everything in the last so many inner chunks of time is for test, but for the guard.

    Returns
    -------
    tuple
        uint8 [time, y, x] of blocks: 0 train, 1 val, 2 test, 3 left out; and the inner chunks of
        such a block, which a guard or held-out dates make smaller than `block`.
    """
    grid = [-(-count // part) for count, part in zip(inner_grid, block, strict=True)]
    names = {"/".join(map(str, at)): at for at in np.ndindex(*grid)}
    sizes = {
        name: math.prod(
            min(part, count - at * part)
            for at, part, count in zip(position, block, inner_grid, strict=True)
        )
        for name, position in names.items()
    }
    # By numbers of inner chunks, because blocks at the far edges are smaller than the others.
    labels = np.empty(grid, np.uint8)
    for name, split in split_by_size(sizes, shares, seed).items():
        labels[names[name]] = SPLIT_NAMES.index(split)
    if not guard and not held_out:
        return labels, block

    # An axis on which nothing is cut off keeps its blocks, and the stored labels stay few.
    fine = (1 if held_out else block[0], 1 if guard else block[1], 1 if guard else block[2])
    voxels = CubeChunking((*inner_grid, 1), (1, 1, 1), (1, 1, 1), block).inner_labels(labels)
    if guard:
        voxels = _ring(voxels, guard)
    if held_out:
        # The guard stays left out: on earlier dates its pixels border on training blocks.
        voxels[-held_out:] = np.where(
            voxels[-held_out:] == LEFT_OUT, LEFT_OUT, SPLIT_NAMES.index("test")
        )
    return np.ascontiguousarray(voxels[:: fine[0], :: fine[1], :: fine[2]]), fine


def _ring(labels: NDArray[np.uint8], guard: int) -> NDArray[np.uint8]:
    """Leave out every inner chunk with one of a higher label within `guard` steps along y and x."""
    _, rows, columns = labels.shape
    highest = labels.copy()
    # A guard wider than the cube reaches its edge, and a slice beyond it would be empty.
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
