"""A cube's inner chunks by split, as a codec takes them.

Read, cut into the model's blocks, encoded, their codes numbered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqvae.compress.codec import CubeCodec
from vqvae.compress.search import CodeSearch, learn_search
from warehouse.layouts.cube.geometry import cube_arrays
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
LEARN_BLOCKS, LEARN_TOKENS = 512, 32_768


class CubePart:
    """The samples of a cube under one label (0 train, 1 val, 2 test, 3 left out), as a ChunkReader
    reads them.
    """

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
    """data float32 and valid bool [n, T, Y, X, F] of samples of a part."""
    found = read_samples(reader, list(part.specs), samples)
    return found["data"], found["valid"]


def encode_blocks(
    codec: CubeCodec,
    data: NDArray[np.float32],
    valid: NDArray[np.bool_],
    search: CodeSearch | None = None,
) -> NDArray[np.int64]:
    """data, valid: [B, T, Y, X, F] of whole inner chunks; codes int64 [B, L, t, y, x].

    Blocks of a windowed model are tiles of them.
    """
    tiles = [size // part for size, part in zip(data.shape[1:4], codec.block, strict=True)]
    codes = codec.encode(
        _cut(torch.from_numpy(data), tiles), _cut(torch.from_numpy(valid), tiles), search
    )
    grid = codes.shape[2:]
    joined = codes.reshape(len(data), *tiles, codes.shape[1], *grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return joined.reshape(
        len(data), codes.shape[1], *(n * g for n, g in zip(tiles, grid, strict=True))
    ).numpy()


def _cut(value: Tensor, tiles: Sequence[int]) -> Tensor:
    """[B, T, Y, X, F] to [B * tiles, T / nt, Y / ny, X / nx, F]."""
    batch, t, y, x, count = value.shape
    nt, ny, nx = tiles
    parts = value.reshape(batch, nt, t // nt, ny, y // ny, nx, x // nx, count).permute(
        0, 1, 3, 5, 2, 4, 6, 7
    )
    return parts.reshape(-1, t // nt, y // ny, x // nx, count).contiguous()


def numbered(rows: NDArray[np.int64], search: CodeSearch) -> NDArray[np.int64]:
    """Rows of the codebooks, int64 [B, L, t, y, x], as the numbers they have on disk."""
    return np.stack(
        [search.order[level].argsort().numpy()[rows[:, level]] for level in range(rows.shape[1])],
        axis=1,
    )


def training_vectors(codec: CubeCodec, warehouse: Warehouse) -> Tensor:
    """float32 [N, D], on the CPU.

    Latent vectors of up to LEARN_BLOCKS training blocks of a cube (of any others where it has
    none).
    """
    labels = warehouse.cube_table("split")
    part = next(
        part for label in range(len(LABEL_NAMES)) if len(part := CubePart(warehouse, label, labels))
    )
    chosen = np.unique(np.linspace(0, len(part) - 1, min(LEARN_BLOCKS, len(part))).astype(np.int64))
    reader, found = part.reader(), []
    for first in range(0, len(chosen), BATCH):
        data, valid = read_blocks(part, reader, chosen[first : first + BATCH])
        tiles = [size // block for size, block in zip(data.shape[1:4], codec.block, strict=True)]
        vectors = codec.vectors(
            _cut(torch.from_numpy(data), tiles), _cut(torch.from_numpy(valid), tiles)
        ).flatten(0, -2)
        # Every n-th position, so that the tokens of any block size fit in memory.
        found.append(vectors[:: max(1, len(vectors) * len(chosen) // (BATCH * LEARN_TOKENS))].cpu())
    return torch.cat(found)


def learned_search(
    codec: CubeCodec, vectors: Tensor, *, levels: int, weight: float, paths: int
) -> CodeSearch:
    """Prices and numbers of codes, from `training_vectors`."""
    return learn_search(vectors, [table.cpu() for table in codec.tables[:levels]], weight, paths)
