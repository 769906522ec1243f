"""Decoding a version of codes: whole stored chunks of the cube that the codes were made of.

The inner chunks of a stored chunk are found among the splits of the codes by their origin, decoded
in batches, and set to NaN where the stored `valid` bits are 0.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae.compress.blocks import BATCH, LABEL_NAMES
from vqvae.compress.codec import CubeCodec, open_codec
from warehouse.errors import StoreError
from warehouse.layouts.cube.geometry import LEFT_OUT, CubeGeometry
from warehouse.read.memory import read_samples
from warehouse.read.version import Split, Warehouse

__all__ = ["CodesOfCube", "decode_blocks", "open_codes"]


class CodesOfCube:
    """A version of codes beside its decoder.

    Parameters
    ----------
    path
        The version, or a warehouse of codes.
    checkpoint
        The one that the codes were made with.
    levels
        How many of the stored residual levels are decoded; None for all.
    device
        Where to decode.

    Raises
    ------
    StoreError
        The version holds no codes.
    StateError
        The codes were made with another checkpoint.
    """

    def __init__(
        self,
        path: Path | str,
        checkpoint: Path | str,
        *,
        levels: int | None = None,
        device: str = "cpu",
    ) -> None:
        self.warehouse = Warehouse.open(path)
        recipe = self.warehouse.manifest.recipe
        if recipe.get("format") != "codes":
            raise StoreError(
                "this version holds no codes",
                where=self.warehouse.location,
                found=recipe.get("format"),
                remedy="make one with python -m scripts.compress_zarr",
            )
        self.codec = open_codec(str(checkpoint), recipe["checkpoint"], device)
        self.cube, self.source = CubeGeometry.of(recipe["source"]["cube"]), recipe["source"]
        stored_levels = recipe["settings"]["levels"]
        self.levels = min(levels or stored_levels, stored_levels)

        # Decoding numbers as rows would give a cube that looks plausible and is wrong.
        rows = np.array(self.warehouse.manifest.summary.get("codebook_rows", ()), np.int64)
        if rows.shape != (stored_levels, self.codec.codebook_size):
            raise StoreError(
                "these codes do not say how they are numbered",
                where=self.warehouse.location,
                found="a version made by an earlier release",
                remedy="make it again with python -m scripts.compress_zarr",
            )
        self.rows = rows

        self.splits: list[Split] = [self.warehouse.split(name) for name in self.warehouse.splits]
        self.readers = [
            split.reader(access="pread", verify="first_touch", keep=12) for split in self.splits
        ]
        self.labels = [LABEL_NAMES.index(split.name) for split in self.splits]

    @cached_property
    def sample_numbers(self) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """(split, sample) of every inner chunk, [stored chunks of the cube, positions in a chunk].

        Both are -1 outside the cube. Memory: 9 bytes for each inner chunk.
        """
        # From the stored origins and not from the cube, which may have been deleted since.
        layout = self.cube.layout
        part = np.full((layout.stored_chunks, layout.slots), -1, np.int8)
        sample = np.full(part.shape, -1, np.int64)
        for number, (split, reader) in enumerate(zip(self.splits, self.readers, strict=True)):
            for chunk, first in enumerate(split.sample_index.starts[:-1].tolist()):
                grid = reader.small("origin", chunk).astype(np.int64) // np.array(layout.inner)
                in_grid, in_shard = grid // layout.per_shard, grid % layout.per_shard
                shard = np.ravel_multi_index(tuple(in_grid.T), layout.shard_grid)
                position = np.ravel_multi_index(tuple(in_shard.T), layout.per_shard)
                part[shard, position] = number
                sample[shard, position] = first + np.arange(len(grid))
        return part, sample

    def decoded(
        self, chunk: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """Decode a stored chunk of the cube.

        Returns
        -------
        tuple
            Positions of its inner chunks, int64 [n]; data float32 [n, T, Y, X, F], NaN where not
            valid; valid, bool of the same shape.
        """
        positions = self.cube.layout.present(chunk)
        row = (*self.cube.layout.inner, self.cube.shape[3])
        data = np.empty((len(positions), *row), np.float32)
        valid = np.empty((len(positions), *row), bool)

        parts, samples = (table[chunk, positions] for table in self.sample_numbers)
        for number in np.unique(parts).tolist():
            in_part = np.flatnonzero(parts == number)
            for first in range(0, len(in_part), BATCH):
                batch = in_part[first : first + BATCH]
                codes, valid[batch] = self.read(number, samples[batch])
                data[batch] = decode_blocks(self.codec, codes, self.cube.layout.inner)
        data[~valid] = np.nan
        return positions, data, valid

    def read(
        self, part: int, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read samples of a split.

        Returns
        -------
        tuple
            Rows of the codebooks, int64 [n, levels, t, y, x], and valid, bool [n, T, Y, X, F].
        """
        out = read_samples(self.readers[part], ["codes", "valid"], samples)
        row = (*self.cube.layout.inner, self.cube.shape[3])
        bits = np.unpackbits(out["valid"], axis=1, count=math.prod(row))
        valid = bits.view(bool).reshape(len(samples), *row)

        rows = [self.rows[level][out["codes"][:, level]] for level in range(self.levels)]
        return np.stack(rows, axis=1), valid

    @cached_property
    def inner_labels(self) -> NDArray[np.uint8]:
        """Label of every inner chunk, uint8 [inner grid]."""
        layout = self.cube.layout
        part, _ = self.sample_numbers
        # -1, outside the cube, is the last entry.
        flat = np.append(self.labels, LEFT_OUT).astype(np.uint8)[part]
        by_axis = flat.reshape(*layout.shard_grid, *layout.per_shard).transpose(0, 3, 1, 4, 2, 5)
        pairs = zip(layout.shard_grid, layout.per_shard, strict=True)
        padded = by_axis.reshape([shards * per_shard for shards, per_shard in pairs])
        t, y, x = layout.inner_grid
        return np.ascontiguousarray(padded[:t, :y, :x])


def decode_blocks(
    codec: CubeCodec, codes: NDArray[np.int64], inner: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Decode whole inner chunks, as the inverse of `encode_blocks`.

    Parameters
    ----------
    codes
        int64 [B, l, t, y, x], rows of the codebooks.
    inner
        Size of an inner chunk, (time, y, x) in voxels.

    Returns
    -------
    numpy.ndarray
        float32 [B, T, Y, X, F].
    """
    nt, ny, nx = (size // part for size, part in zip(inner, codec.block, strict=True))
    t, y, x = codec.grid
    batch, levels = codes.shape[:2]
    split = torch.from_numpy(codes).reshape(batch, levels, nt, t, ny, y, nx, x)
    tiles = split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, levels, t, y, x)

    bt, by, bx = codec.block
    data = codec.decode(tiles).reshape(batch, nt, ny, nx, bt, by, bx, -1)
    joined = data.permute(0, 1, 4, 2, 5, 3, 6, 7)
    out: NDArray[np.float32] = joined.reshape(batch, *inner, -1).numpy()
    return out


# A dask task or a worker has only the paths: without the cache each would open codes and model
# again for every stored chunk.
@lru_cache(maxsize=2)
def open_codes(path: str, checkpoint: str, levels: int | None, device: str = "cpu") -> CodesOfCube:
    """Return the codes of a version, opened once in each process."""
    return CodesOfCube(path, checkpoint, levels=levels, device=device)
