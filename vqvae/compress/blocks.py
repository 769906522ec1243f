"""A cube's inner chunks by split, as a codec takes them.

They are read, cut into the model's blocks and encoded, and their codes are numbered. A model that
was trained on windows of inner chunks is applied to tiles of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqvae.compress.codec import CubeCodec
from vqvae.compress.search import CodeSearch, learn_search
from warehouse.layouts.cube.arrays import cube_arrays
from warehouse.layouts.cube.layout import Cube
from warehouse.read.chunks import ChunkReader, SplitSource
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse
from warehouse.settings import SPLIT_NAMES

__all__ = [
    "BATCH",
    "LABEL_NAMES",
    "CubePart",
    "encode_blocks",
    "learned_search",
    "numbered",
    "read_blocks",
    "training_vectors",
]

LABEL_NAMES = (*SPLIT_NAMES, "left_out")

BATCH = 32
"""Inner chunks in the encoder or decoder at once, which bounds the memory of activations."""

LEARN_BLOCKS, LEARN_TOKENS = 512, 32_768
"""Blocks and latent vectors, at most, from which the prices of codes are learned."""


class CubePart:
    """The samples of a cube under one label, as a ChunkReader reads them.

    Parameters
    ----------
    warehouse
        A version of a cube.
    label
        0 train, 1 val, 2 test, 3 left out.
    labels
        The cube's table `split`, to read it once for several parts; None reads it.
    """

    # `Warehouse.split` knows no split of what was left out, and the reconstruction needs those
    # inner chunks too.

    def __init__(
        self, warehouse: Warehouse, label: int, labels: NDArray[np.uint8] | None = None
    ) -> None:
        cube = warehouse.layout
        assert isinstance(cube, Cube)
        self.warehouse, self.name = warehouse, LABEL_NAMES[label]
        if labels is None:
            labels = warehouse.cube_table("split")

        self.sample_index = cube.label_index(label, labels)
        compressor = warehouse.manifest.arrays["data"].codec.cname or "none"
        arrays = cube_arrays(cube.geometry.layout, compressor, len(self.sample_index))
        self.specs = {spec.name: spec for spec in arrays}

    def __len__(self) -> int:
        return len(self.sample_index)

    def reader(self) -> ChunkReader:
        """A reader that compares every checksum."""
        cube = self.warehouse.layout
        source = SplitSource(
            files=self.warehouse.stored_files,
            name=self.name,
            group=cube.group(self.name),
            specs=self.specs,
            stored_specs={name: cube.stored_spec(spec) for name, spec in self.specs.items()},
            sample_index=self.sample_index,
            samples=len(self),
            chunks=len(self.sample_index.chunk_sizes),
            origins=self.sample_index.origins,
        )
        return ChunkReader(source, access="pread", verify="always", keep=4)


def read_blocks(
    part: CubePart, reader: ChunkReader, samples: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return data float32 and valid bool [n, T, Y, X, F] of samples of a part."""
    found = read_samples(reader, list(part.specs), samples)
    return found["data"], found["valid"]


def encode_blocks(
    codec: CubeCodec,
    data: NDArray[np.float32],
    valid: NDArray[np.bool_],
    search: CodeSearch | None = None,
) -> NDArray[np.int64]:
    """Encode whole inner chunks.

    Parameters
    ----------
    data, valid
        float32 and bool [B, T, Y, X, F].
    search
        How codes are chosen; None for the nearest.

    Returns
    -------
    numpy.ndarray
        int64 [B, L, t, y, x], rows of the codebooks.
    """
    tiles = [size // part for size, part in zip(data.shape[1:4], codec.block, strict=True)]
    tiled = _cut(torch.from_numpy(data), tiles), _cut(torch.from_numpy(valid), tiles)
    codes = codec.encode(*tiled, search)

    batch, levels, grid = len(data), codes.shape[1], codes.shape[2:]
    joined = codes.reshape(batch, *tiles, levels, *grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    positions = [count * size for count, size in zip(tiles, grid, strict=True)]
    return joined.reshape(batch, levels, *positions).numpy()


def _cut(value: Tensor, tiles: Sequence[int]) -> Tensor:
    """[B, T, Y, X, F] to [B * tiles, T / nt, Y / ny, X / nx, F]."""
    batch, t, y, x, count = value.shape
    nt, ny, nx = tiles
    split = value.reshape(batch, nt, t // nt, ny, y // ny, nx, x // nx, count)
    parts = split.permute(0, 1, 3, 5, 2, 4, 6, 7)
    return parts.reshape(-1, t // nt, y // ny, x // nx, count).contiguous()


def numbered(rows: NDArray[np.int64], search: CodeSearch) -> NDArray[np.int64]:
    """Return rows of the codebooks, int64 [B, L, t, y, x], as the numbers they have on disk."""
    levels = range(rows.shape[1])
    numbers = [search.order[level].argsort().numpy() for level in levels]
    return np.stack([numbers[level][rows[:, level]] for level in levels], axis=1)


def training_vectors(codec: CubeCodec, warehouse: Warehouse) -> Tensor:
    """Return latent vectors of up to LEARN_BLOCKS blocks of a cube, spread over the split.

    Returns
    -------
    Tensor
        float32 [N, D], on the CPU.
    """
    # Training blocks, since prices learned from held-out ones would flatter the report. A cube
    # without any has its first label that is not empty.
    labels = warehouse.cube_table("split")
    parts = (CubePart(warehouse, label, labels) for label in range(len(LABEL_NAMES)))
    part = next(part for part in parts if len(part))

    chosen = np.unique(np.linspace(0, len(part) - 1, min(LEARN_BLOCKS, len(part))).astype(np.int64))
    reader, found = part.reader(), []
    for first in range(0, len(chosen), BATCH):
        data, valid = read_blocks(part, reader, chosen[first : first + BATCH])
        tiles = [size // block for size, block in zip(data.shape[1:4], codec.block, strict=True)]
        tiled = _cut(torch.from_numpy(data), tiles), _cut(torch.from_numpy(valid), tiles)
        vectors = codec.vectors(*tiled).flatten(0, -2)

        # Every n-th position, so that the tokens of any block size fit in memory.
        step = max(1, len(vectors) * len(chosen) // (BATCH * LEARN_TOKENS))
        found.append(vectors[::step].cpu())
    return torch.cat(found)


def learned_search(
    codec: CubeCodec, vectors: Tensor, *, levels: int, weight: float, paths: int
) -> CodeSearch:
    """Return the search of a codec's first levels, learned from its `training_vectors`.

    Parameters
    ----------
    levels
        How many levels are chosen.
    weight
        Thousandths of the variance of the vectors that a bit is worth.
    paths
        Sequences of codes that are kept at each level.
    """
    return learn_search(vectors, [table.cpu() for table in codec.tables[:levels]], weight, paths)
