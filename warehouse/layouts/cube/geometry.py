"""What a cube is made of: its features, its geometry, the places of its samples.

A cube is one array [time, y, x, feature] cut into samples (time, y, x, all features), stored chunks
(one is a file) and label blocks (one belongs to one split). A sample is one inner chunk, or one a
feature group: splits, sample numbers and shares of valid values know nothing of feature groups.
`CubeChunking` is the arithmetic between them; `CubeSampleIndex` numbers the samples of a split by (stored
chunk, place in it), C order. Categorical values are stored as their codes (float32, NaN where
missing); statistics are over valid voxels of the training split. Memory: 16 bytes a sample of the
split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.format.schema import ArraySpec, Codec
from warehouse.layouts.features import Feature
from warehouse.settings import SPLIT_NAMES

__all__ = [
    "LABELS",
    "LEFT_OUT",
    "VALID_SHARE",
    "CubeChunking",
    "CubeGeometry",
    "CubeSampleIndex",
    "cube_arrays",
]

Box = tuple[int, int, int]
LEFT_OUT = 3
"""The label of blocks in no split; 0, 1, 2 are train, val, test."""


@dataclass(frozen=True)
class CubeChunking:
    """Shapes in voxels. shape: (time, y, x, feature); inner, shard, block: (time, y, x), the last
    two multiples of inner.

    Stored chunks are numbered in C order over `shard_grid`, samples of one in C order over
    `per_shard`. feature_group: features of an inner chunk; the last group of a sample is stored in
    full size too.
    """

    shape: tuple[int, int, int, int]
    inner: Box
    shard: Box
    block: Box
    feature_group: int | None = None

    @property
    def group(self) -> int:
        """Features of an inner chunk, at most all."""
        return (
            self.shape[3] if self.feature_group is None else min(self.feature_group, self.shape[3])
        )

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
        """Samples a stored chunk has room for."""
        return math.prod(self.per_shard)

    @property
    def stored_chunks(self) -> int:
        return math.prod(self.shard_grid)

    def _parts(self, box: Box) -> Box:
        return -(-self.shape[0] // box[0]), -(-self.shape[1] // box[1]), -(-self.shape[2] // box[2])

    def present(self, chunk: int) -> NDArray[np.int64]:
        """Slots of a stored chunk that lie inside the array, ascending."""
        corner = np.array(np.unravel_index(chunk, self.shard_grid)) * self.per_shard
        inside = [
            np.arange(start, start + count) < limit
            for start, count, limit in zip(corner, self.per_shard, self.inner_grid, strict=True)
        ]
        return np.flatnonzero(inside[0][:, None, None] & inside[1][:, None] & inside[2]).astype(
            np.int64
        )

    def origins(self, chunks: NDArray[np.int64], slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """(t, y, x) of the first voxel of inner chunks, int64 [n, 3]."""
        corner = np.stack(np.unravel_index(chunks, self.shard_grid), axis=1) * np.array(
            self.per_shard
        )
        within = np.stack(np.unravel_index(slots, self.per_shard), axis=1)
        origins: NDArray[np.int64] = ((corner + within) * np.array(self.inner)).astype(np.int64)
        return origins

    def by_chunk(self, values: NDArray[Any], fill: Any) -> NDArray[Any]:
        """One value an inner chunk, [inner grid] -> [stored chunks, slots].

        Slots outside the array hold `fill`.
        """
        grid, per = self.shard_grid, self.per_shard
        room = np.full([g * p for g, p in zip(grid, per, strict=True)], fill, values.dtype)
        room[: values.shape[0], : values.shape[1], : values.shape[2]] = values
        cut = room.reshape(grid[0], per[0], grid[1], per[1], grid[2], per[2]).transpose(
            0, 2, 4, 1, 3, 5
        )
        return cut.reshape(self.stored_chunks, self.slots)

    def inner_labels(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels of blocks [block grid] -> of inner chunks [inner grid]."""
        for axis, count in enumerate(self.inner_grid):
            labels = np.repeat(labels, self.block[axis] // self.inner[axis], axis=axis).take(
                range(count), axis=axis
            )
        return labels

    def to_json(self) -> dict[str, Any]:
        boxes = {
            "shape": list(self.shape),
            "inner": list(self.inner),
            "shard": list(self.shard),
            "block": list(self.block),
        }
        return boxes | {"feature_group": self.group}


class CubeSampleIndex:
    """Places of one split of a cube (see warehouse/layouts/base.py). labels: u1 [block grid].

    label: 0 train, 1 val, 2 test.
    """

    def __init__(self, layout: CubeChunking, labels: NDArray[np.uint8], label: int) -> None:
        self.layout = layout
        flat = np.flatnonzero(
            layout.by_chunk(layout.inner_labels(labels), 255).reshape(-1) == label
        )
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
        """One value an inner chunk, [inner grid] -> one a sample of the split, [samples]."""
        by_chunk = self.layout.by_chunk(values, values.dtype.type(0))
        chosen: NDArray[Any] = by_chunk[self.numbers[self.chunks], self.slots]
        return chosen

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(t, y, x) voxel offsets of samples in the cube, int64 [n, 3]."""
        return self.layout.origins(self.numbers[self.chunks[indices]], self.slots[indices])


@dataclass(frozen=True)
class CubeGeometry:
    """A published cube: layout, features, place. times: ISO 8601, one a step; transform: affine a,
    b, c, d, e, f of pixel corners.

    crs_wkt: WKT2:2019 (ISO 19162). extent: rows and columns of the declared grid; the array goes on
    right and down to whole inner chunks, missing there.
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
    def of(cls, raw: dict[str, Any]) -> CubeGeometry:
        boxes = tuple(raw["shape"]), tuple(raw["inner"]), tuple(raw["shard"]), tuple(raw["block"])
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


def cube_arrays(
    layout: CubeChunking, compressor: str, samples: int | None = None
) -> list[ArraySpec]:
    """`data` and `valid` as readers and the builder see them, [sample, time, y, x, feature].

    `grid` finds the file.
    """
    row, part = (*layout.inner, layout.shape[3]), (1, *layout.inner, layout.group)
    cname: Any = None if compressor == "none" else compressor
    level = 5 if cname == "lz4hc" else 9
    # Shuffling whole voxels puts equal bytes of one feature side by side: ratio 2.67 against 1.77
    # on NAIP (DESIGN section 2).
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

    `blocks`: a value a label block, else one an inner chunk.
    """

    name: str
    dtype: str
    dims: tuple[str, str, str]
    blocks: bool
    text: str

    def spec(self, layout: CubeChunking) -> ArraySpec:
        shape = layout.block_grid if self.blocks else layout.inner_grid
        itemsize = np.dtype(self.dtype).itemsize
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
