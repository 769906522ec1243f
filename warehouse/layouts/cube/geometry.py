"""The geometry of a cube, and in which stored chunk and inner chunk each sample is.

A cube is one array [time, y, x, feature] that is cut into samples (time, y, x, all features),
stored chunks (each is a file) and label blocks (each belongs to one split). A sample is one inner
chunk, or one for each feature group: splits, sample numbers and shares of valid values know nothing
of feature groups. `CubeChunking` is the arithmetic between them; `CubeSampleIndex` numbers the
samples of a split by (stored chunk, inner chunk), both in C order. Categorical values are stored as
their codes (float32, NaN where missing); statistics are over valid voxels of the training split.
Given up: an index that is computed when it is asked for; it takes 16 bytes of memory for each
sample of the split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.layouts.features import Feature
from warehouse.settings import SPLIT_NAMES

__all__ = [
    "LEFT_OUT",
    "CubeChunking",
    "CubeGeometry",
    "CubeSampleIndex",
]

Box = tuple[int, int, int]
"""(time, y, x), in voxels or in chunks."""

LEFT_OUT = 3
"""The label of blocks in no split; 0, 1, 2 are train, val, test."""


@dataclass(frozen=True)
class CubeChunking:
    """How a cube is cut into inner chunks, stored chunks and label blocks.

    Stored chunks are numbered in C order over `shard_grid`, the samples of each in C order over
    `per_shard`.

    Attributes
    ----------
    shape
        (time, y, x, feature) of the cube, in voxels.
    inner
        (time, y, x) of a sample, in voxels.
    shard, block
        (time, y, x) of a stored chunk and of a label block; multiples of `inner`.
    feature_group
        Features of an inner chunk, None for all. The last group of a sample is stored in full size
        too.
    """

    shape: tuple[int, int, int, int]
    inner: Box
    shard: Box
    block: Box
    feature_group: int | None = None

    @property
    def group(self) -> int:
        """Number of features of an inner chunk, at most all."""
        every = self.shape[3]
        return every if self.feature_group is None else min(self.feature_group, every)

    @property
    def inner_grid(self) -> Box:
        return self._parts(self.inner)

    @property
    def shard_grid(self) -> Box:
        return self._parts(self.shard)

    @property
    def block_grid(self) -> Box:
        return self._parts(self.block)

    @property
    def per_shard(self) -> Box:
        return (
            self.shard[0] // self.inner[0],
            self.shard[1] // self.inner[1],
            self.shard[2] // self.inner[2],
        )

    @property
    def slots(self) -> int:
        """Number of samples that a stored chunk has room for."""
        return math.prod(self.per_shard)

    @property
    def stored_chunks(self) -> int:
        return math.prod(self.shard_grid)

    def _parts(self, box: Box) -> Box:
        return -(-self.shape[0] // box[0]), -(-self.shape[1] // box[1]), -(-self.shape[2] // box[2])

    def present(self, chunk: int) -> NDArray[np.int64]:
        """Return the positions in a stored chunk that lie inside the array, ascending."""
        corner = np.array(np.unravel_index(chunk, self.shard_grid)) * self.per_shard
        inside = [
            np.arange(start, start + count) < limit
            for start, count, limit in zip(corner, self.per_shard, self.inner_grid, strict=True)
        ]
        grid = inside[0][:, None, None] & inside[1][:, None] & inside[2]

        # `flatnonzero` gives the platform's integer, which has 32 bits on Windows.
        return np.flatnonzero(grid).astype(np.int64)

    def origins(self, chunks: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (t, y, x) of the first voxel of inner chunks, int64 [n, 3]."""
        corner = np.stack(np.unravel_index(chunks, self.shard_grid), axis=1) * np.array(
            self.per_shard
        )
        within = np.stack(np.unravel_index(slots, self.per_shard), axis=1)
        origins: NDArray[np.int64] = ((corner + within) * np.array(self.inner)).astype(np.int64)
        return origins

    def by_chunk(self, values: NDArray[Any], fill: object) -> NDArray[Any]:
        """Return values of inner chunks, [inner grid], as [stored chunks, slots].

        Slots outside the array hold `fill`.
        """
        grid, per = self.shard_grid, self.per_shard
        room = np.full([g * p for g, p in zip(grid, per, strict=True)], fill, values.dtype)
        room[: values.shape[0], : values.shape[1], : values.shape[2]] = values
        # The stored chunks' axes first, then those of the slots in them.
        cut = room.reshape(grid[0], per[0], grid[1], per[1], grid[2], per[2])
        cut = cut.transpose(0, 2, 4, 1, 3, 5)

        return cut.reshape(self.stored_chunks, self.slots)

    def inner_labels(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return labels of blocks, [block grid], as labels of inner chunks, [inner grid]."""
        for axis, count in enumerate(self.inner_grid):
            repeats = self.block[axis] // self.inner[axis]
            # The last block of an axis may reach beyond the cube.
            labels = np.repeat(labels, repeats, axis=axis).take(range(count), axis=axis)
        return labels

    def to_json(self) -> dict[str, Any]:
        """Return the chunking as a part of the manifest's `cube`."""
        boxes = {
            "shape": list(self.shape),
            "inner": list(self.inner),
            "shard": list(self.shard),
            "block": list(self.block),
        }
        return boxes | {"feature_group": self.group}


class CubeSampleIndex:
    """The sample index of one split of a cube; see `warehouse.layouts.base.SampleIndex`.

    Parameters
    ----------
    labels
        Split of each label block, uint8 [block grid].
    label
        The split: 0 train, 1 val, 2 test, 3 left out.
    """

    def __init__(self, layout: CubeChunking, labels: NDArray[np.uint8], label: int) -> None:
        self.layout = layout
        # 255 is no label: slots outside the array belong to no split, not even to what is left out.
        by_chunk = layout.by_chunk(layout.inner_labels(labels), 255)
        flat = np.flatnonzero(by_chunk.reshape(-1) == label)
        numbers, self.slots = np.divmod(flat.astype(np.int64), layout.slots)
        self.numbers, self.chunks, counts = np.unique(
            numbers, return_inverse=True, return_counts=True
        )
        self.chunk_sizes: list[int] = counts.tolist()
        self.starts: NDArray[np.int64] = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)

    def __len__(self) -> int:
        return len(self.slots)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.chunks[indices], self.slots[indices]

    def stored(self, chunk: int) -> int:
        return int(self.numbers[chunk])

    def present(self, chunk: int) -> NDArray[np.int64]:
        return self.layout.present(self.stored(chunk))

    def gather(self, values: NDArray[Any]) -> NDArray[Any]:
        """Take values of inner chunks, [inner grid], to the samples of the split, [samples]."""
        by_chunk = self.layout.by_chunk(values, values.dtype.type(0))
        chosen: NDArray[Any] = by_chunk[self.numbers[self.chunks], self.slots]
        return chosen

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (t, y, x) of the first voxel of each sample in the cube, int64 [n, 3]."""
        return self.layout.origins(self.numbers[self.chunks[indices]], self.slots[indices])


@dataclass(frozen=True)
class CubeGeometry:
    """What the manifest keeps of a cube: its chunking, its features and where it lies.

    Attributes
    ----------
    times
        Date of each time step, ISO 8601.
    crs_wkt
        Coordinate reference system, WKT2:2019 (ISO 19162).
    crs_code
        Its code, such as EPSG:32614, where it has one.
    transform
        Affine (a, b, c, d, e, f) from (column, row) of pixel corners to (x, y).
    extent
        Rows and columns of the declared grid. The array extends to the right and down to complete
        inner chunks, whose further voxels are missing values.
    """

    layout: CubeChunking
    features: tuple[Feature, ...]
    times: tuple[str, ...]
    crs_wkt: str
    crs_code: str | None
    transform: tuple[float, ...]
    extent: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.layout.shape

    @cached_property
    def dates(self) -> NDArray[np.datetime64]:
        return np.array(self.times, dtype="datetime64[s]")

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's `cube`."""
        return self.layout.to_json() | {
            "features": [feature.to_json() for feature in self.features],
            "times": list(self.times),
            "crs_wkt": self.crs_wkt,
            "crs_code": self.crs_code,
            "transform": list(self.transform),
            "extent": list(self.extent),
            "labels": {name: at for at, name in enumerate((*SPLIT_NAMES, "left_out"))},
        }

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> CubeGeometry:
        """Return the geometry that the manifest's `cube` describes."""
        boxes = tuple(raw["shape"]), tuple(raw["inner"]), tuple(raw["shard"]), tuple(raw["block"])
        # Cubes that were built before there were feature groups do not have the key.
        layout = CubeChunking(*boxes, raw.get("feature_group"))
        features = tuple(Feature.of(each) for each in raw["features"])
        return cls(
            layout,
            features,
            tuple(raw["times"]),
            raw["crs_wkt"],
            raw["crs_code"],
            tuple(raw["transform"]),
            tuple(raw["extent"]),
        )
