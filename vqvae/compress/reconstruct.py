"""Codes back to the cube they were made of: lazily as xarray, or as a published cube version.

The unit is a stored chunk of the original cube: its inner chunks are found among the splits of the
codes by their origin, decoded in batches, and made NaN where the kept `valid` bits say so. Memory:
one stored chunk of the cube a task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae.compress.blocks import BATCH, LABEL_NAMES
from vqvae.compress.encode import open_codec
from warehouse.errors import StoreError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION
from warehouse.layouts.cube.feature_stats import block_facts
from warehouse.layouts.cube.geometry import LEFT_OUT, CubeGeometry, cube_arrays
from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.read.memory import read_samples
from warehouse.read.version import Split, Warehouse

__all__ = ["CodesOfCube", "decode_blocks", "plan_reconstruction", "reconstruct"]


class CodesOfCube:
    """A version of codes beside its decoder. levels: how many of the kept residual levels are
    decoded; None: all.

    Raises StoreError where the version holds no codes, StateError for another checkpoint than they
    were made with.
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
        self.levels = min(levels or recipe["settings"]["levels"], recipe["settings"]["levels"])
        rows = np.array(self.warehouse.manifest.summary.get("codebook_rows", ()), np.int64)
        if rows.shape != (recipe["settings"]["levels"], self.codec.codebook_size):
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
    def places(self) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """(split, sample) of every inner chunk, [stored chunks of the cube, slots].

        -1 outside the cube. Memory: 9 bytes a sample.
        """
        layout = self.cube.layout
        part = np.full((layout.stored_chunks, layout.slots), -1, np.int8)
        sample = np.full(part.shape, -1, np.int64)
        for number, (split, reader) in enumerate(zip(self.splits, self.readers, strict=True)):
            for chunk, first in enumerate(split.sample_index.starts[:-1].tolist()):
                grid = reader.small("origin", chunk).astype(np.int64) // np.array(layout.inner)
                shard = np.ravel_multi_index(tuple((grid // layout.per_shard).T), layout.shard_grid)
                slot = np.ravel_multi_index(tuple((grid % layout.per_shard).T), layout.per_shard)
                part[shard, slot], sample[shard, slot] = number, first + np.arange(len(grid))
        return part, sample

    def decoded(
        self, chunk: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """(slots, data, valid) of a stored chunk of the cube.

        Data float32 [n, T, Y, X, F], NaN where not valid.
        """
        slots = self.cube.layout.present(chunk)
        row = (*self.cube.layout.inner, self.cube.shape[3])
        data, valid = np.empty((len(slots), *row), np.float32), np.empty((len(slots), *row), bool)
        parts, samples = (table[chunk, slots] for table in self.places)
        for number in np.unique(parts).tolist():
            at = np.flatnonzero(parts == number)
            for first in range(0, len(at), BATCH):
                some = at[first : first + BATCH]
                codes, mask = self.read(number, samples[some])
                data[some], valid[some] = (
                    decode_blocks(self.codec, codes, self.cube.layout.inner),
                    mask,
                )
        data[~valid] = np.nan
        return slots, data, valid

    def read(
        self, part: int, samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(rows of the codebooks int64 [n, levels, t, y, x], valid bool [n, T, Y, X, F]) of samples
        of a split.
        """
        out = read_samples(self.readers[part], ["codes", "valid"], samples)
        row = (*self.cube.layout.inner, self.cube.shape[3])
        valid = (
            np.unpackbits(out["valid"], axis=1, count=math.prod(row))
            .view(bool)
            .reshape(len(samples), *row)
        )
        rows = np.stack(
            [self.rows[level][out["codes"][:, level]] for level in range(self.levels)], axis=1
        )
        return rows, valid

    @cached_property
    def inner_labels(self) -> NDArray[np.uint8]:
        """Label of every inner chunk, u1 [inner grid]."""
        layout = self.cube.layout
        part, _ = self.places
        flat = np.append(self.labels, LEFT_OUT).astype(np.uint8)[part]
        room = flat.reshape(*layout.shard_grid, *layout.per_shard).transpose(0, 3, 1, 4, 2, 5)
        t, y, x = layout.inner_grid
        return np.ascontiguousarray(
            room.reshape(
                [grid * per for grid, per in zip(layout.shard_grid, layout.per_shard, strict=True)]
            )[:t, :y, :x]
        )


def decode_blocks(
    codec: Any, codes: NDArray[np.int64], inner: tuple[int, int, int]
) -> NDArray[np.float32]:
    """codes: int64 [B, l, t, y, x] of whole inner chunks; float32 [B, T, Y, X, F].

    The inverse of `encode_blocks`.
    """
    nt, ny, nx = (size // part for size, part in zip(inner, codec.block, strict=True))
    t, y, x = codec.grid
    batch, levels = codes.shape[:2]
    cut = (
        torch.from_numpy(codes)
        .reshape(batch, levels, nt, t, ny, y, nx, x)
        .permute(0, 2, 4, 6, 1, 3, 5, 7)
    )
    data = codec.decode(cut.reshape(-1, levels, t, y, x))
    bt, by, bx = codec.block
    whole = data.reshape(batch, nt, ny, nx, bt, by, bx, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    out: NDArray[np.float32] = whole.reshape(batch, *inner, -1).numpy()
    return out


@lru_cache(maxsize=2)
def _opened(path: str, checkpoint: str, levels: int | None, device: str = "cpu") -> CodesOfCube:
    return CodesOfCube(path, checkpoint, levels=levels, device=device)


def reconstruct(
    codes_path: Path | str, checkpoint: Path | str, *, levels: int | None = None
) -> Any:
    """The cube as a lazy xarray.Dataset: `data` float32 (time, y, x, feature), NaN where missing, a
    dask chunk a stored chunk.

    Raises StoreError where there are no codes, StateError for another checkpoint than they were
    made with.
    """
    import dask.array
    import xarray

    path = str(Warehouse.open(codes_path).location)
    codes = _opened(path, str(checkpoint), levels)
    cube, layout = codes.cube, codes.cube.layout
    sizes = [
        (step,) * (size // step) + ((size % step,) if size % step else ())
        for size, step in zip(cube.shape[:3], layout.shard, strict=True)
    ]
    block = partial(_block, path=path, checkpoint=str(checkpoint), levels=levels)
    data = dask.array.map_blocks(
        block,
        chunks=(*sizes, (cube.shape[3],)),
        dtype=np.float32,
        meta=np.empty((0, 0, 0, 0), np.float32),
    )
    a, _, c, _, e, f = cube.transform
    _, height, width, _ = cube.shape
    coords = {
        "time": cube.dates.astype("datetime64[ns]"),
        "y": f + e * (np.arange(height) + 0.5),
        "x": c + a * (np.arange(width) + 0.5),
        "feature": [feature.name for feature in cube.features],
    }
    place = {
        "crs_wkt": cube.crs_wkt,
        "spatial_ref": cube.crs_wkt,
        "GeoTransform": f"{c} {a} 0.0 {f} 0.0 {e}",
    }
    dataset = xarray.Dataset(
        {"data": (("time", "y", "x", "feature"), data, {"grid_mapping": "spatial_ref"})}, coords
    )
    return dataset.assign_coords(spatial_ref=((), 0, place))


def _block(
    *, path: str, checkpoint: str, levels: int | None, block_id: tuple[int, ...]
) -> NDArray[np.float32]:
    codes = _opened(path, checkpoint, levels)
    layout = codes.cube.layout
    _, blocks, _ = codes.decoded(int(np.ravel_multi_index(block_id[:3], layout.shard_grid)))
    left = np.array(layout.shape[:3]) - np.array(block_id[:3]) * np.array(layout.shard)
    size: NDArray[np.int64] = np.minimum(layout.shard, left)
    counts = -(-size // np.array(layout.inner, np.int64))
    return _joined(blocks, counts)[: size[0], : size[1], : size[2]]


@dataclass(frozen=True)
class ReconstructionLoader:
    """`load` of the builder: number of a stored chunk -> its reconstructed inner chunks."""

    path: str
    checkpoint: str
    levels: int
    device: str

    def __call__(self, chunk: int) -> Block:
        start = time.perf_counter()
        codes = _opened(self.path, self.checkpoint, self.levels, self.device)
        layout, features = codes.cube.layout, codes.cube.features
        slots, data, valid = codes.decoded(chunk)
        corner = np.array(np.unravel_index(chunk, layout.shard_grid)) * layout.per_shard
        origins = layout.origins(np.full(len(slots), chunk), slots)
        place = origins // np.array(layout.inner)
        train = codes.inner_labels[tuple(place.T)] == 0
        counts = np.minimum(layout.per_shard, np.array(layout.inner_grid) - corner)
        joined, mask = (
            _joined(data, counts),
            _joined(np.broadcast_to(train[:, None, None, None, None], data[..., :1].shape), counts)[
                ..., 0
            ],
        )
        t0 = int(corner[0]) * layout.inner[0]
        dates = min(joined.shape[0], layout.shape[0] - t0)
        rows = max(0, min(joined.shape[1], codes.cube.extent[0] - int(corner[1]) * layout.inner[1]))
        columns = max(
            0, min(joined.shape[2], codes.cube.extent[1] - int(corner[2]) * layout.inner[2])
        )
        facts = block_facts(
            joined[:dates, :rows, :columns], mask[:dates, :rows, :columns], t0, features
        )
        facts["valid_share"] = (
            valid.mean(axis=(1, 2, 3, 4), dtype=np.float64).astype(np.float32).tolist()
        )
        return Block(
            slots.tolist(), _samples(data, valid), {"decode": time.perf_counter() - start}, facts
        )


def _samples(
    data: NDArray[np.float32], valid: NDArray[np.bool_]
) -> Iterator[dict[str, NDArray[Any]]]:
    for at in range(len(data)):
        yield {"data": data[at], "valid": valid[at]}


def _joined(blocks: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
    """[n, T, Y, X, F], inner chunks in C order of counts (t, y, x), as one array [t * T, y * Y, x *
    X, F].
    """
    nt, ny, nx = counts.tolist()
    _, t, y, x, count = blocks.shape
    return (
        blocks.reshape(nt, ny, nx, t, y, x, count)
        .transpose(0, 3, 1, 4, 2, 5, 6)
        .reshape(nt * t, ny * y, nx * x, count)
    )


def plan_reconstruction(
    codes_path: Path | str,
    checkpoint: Path | str,
    *,
    levels: int | None = None,
    device: str = "cpu",
) -> tuple[BuildPlan, ReconstructionLoader]:
    """The build of a cube version from codes and its `load`.

    Layout, labels and georeference of the original, its own statistics.
    """
    path = str(Warehouse.open(codes_path).location)
    codes = _opened(path, str(checkpoint), levels, device)
    cube, layout = codes.cube, codes.cube.layout
    steps = [block // inner for block, inner in zip(layout.block, layout.inner, strict=True)]
    labels = np.ascontiguousarray(codes.inner_labels[:: steps[0], :: steps[1], :: steps[2]])
    compressor = "lz4"
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "reconstruction",
        "source": {"version": codes.warehouse.version, "digest": codes.warehouse.manifest.digest},
        "settings": {"levels": codes.levels, "compressor": compressor},
    }
    version, key = version_name(recipe)
    numbers = tuple(range(layout.stored_chunks))
    split = SplitPlan.of_chunks("cube", cube_arrays(layout, compressor), numbers)
    summary = {key: value for key, value in codes.source["summary"].items() if key != "samples"}
    summary |= {"codes": codes.warehouse.version}
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain() | {"torch": torch.__version__},
        splits=(split,),
        found=1,
        kept=1,
        summary=summary,
        layout=Cube(cube, labels, ("",) * len(cube.times), keep_empty_dates=True),
    )
    return plan, ReconstructionLoader(path, str(checkpoint), codes.levels, device)
