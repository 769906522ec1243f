"""The cube that codes decode to: lazily as xarray, or as a published cube version.

The unit is a stored chunk of the original cube. Memory: one stored chunk for each task.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae.compress.decode import open_codes
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION
from warehouse.layouts.cube.arrays import cube_arrays
from warehouse.layouts.cube.feature_stats import block_facts
from warehouse.layouts.cube.geometry import CubeGeometry
from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.read.version import Warehouse

if TYPE_CHECKING:
    import xarray

__all__ = ["ReconstructionLoader", "plan_reconstruction", "reconstruct"]


def reconstruct(
    codes_path: Path | str, checkpoint: Path | str, *, levels: int | None = None
) -> xarray.Dataset:
    """Return the cube that codes decode to, without decoding it yet.

    Parameters
    ----------
    codes_path
        A version of codes, or a warehouse of them.
    checkpoint
        The one that the codes were made with.
    levels
        How many of the stored residual levels are decoded; None for all.

    Returns
    -------
    xarray.Dataset
        `data` float32 (time, y, x, feature), NaN where missing, with one dask chunk for each stored
        chunk of the original cube.

    Raises
    ------
    StoreError
        The version holds no codes.
    StateError
        The codes were made with another checkpoint.

    Examples
    --------
    >>> cube = reconstruct("artifacts/codes", "checkpoints/vqvae")  # doctest: +SKIP
    >>> cube["data"].sel(feature="red").isel(time=0).values  # doctest: +SKIP
    """
    import dask.array
    import xarray

    path = str(Warehouse.open(codes_path).location)
    codes = open_codes(path, str(checkpoint), levels)
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
        # Without it dask would find out the type by decoding a chunk.
        meta=np.empty((0, 0, 0, 0), np.float32),
    )
    dimensions = ("time", "y", "x", "feature")
    arrays = {"data": (dimensions, data, {"grid_mapping": "spatial_ref"})}
    return xarray.Dataset(arrays).assign_coords(_coordinates(cube))


def _coordinates(cube: CubeGeometry) -> dict[str, object]:
    """Return the coordinates of a cube as CF has them."""
    # Of pixel centres; the transform is of pixel corners.
    a, _, c, _, e, f = cube.transform
    _, height, width, _ = cube.shape
    # CF names the first of the two attributes of the CRS, GDAL reads the second.
    georeference = {
        "crs_wkt": cube.crs_wkt,
        "spatial_ref": cube.crs_wkt,
        "GeoTransform": f"{c} {a} 0.0 {f} 0.0 {e}",
    }
    return {
        "time": cube.dates.astype("datetime64[ns]"),
        "y": f + e * (np.arange(height) + 0.5),
        "x": c + a * (np.arange(width) + 0.5),
        "feature": [feature.name for feature in cube.features],
        "spatial_ref": ((), 0, georeference),
    }


def _block(
    *, path: str, checkpoint: str, levels: int | None, block_id: tuple[int, ...]
) -> NDArray[np.float32]:
    codes = open_codes(path, checkpoint, levels)
    layout = codes.cube.layout
    _, blocks, _ = codes.decoded(int(np.ravel_multi_index(block_id[:3], layout.shard_grid)))
    left = np.array(layout.shape[:3]) - np.array(block_id[:3]) * np.array(layout.shard)
    size: NDArray[np.int64] = np.minimum(layout.shard, left)
    counts = -(-size // np.array(layout.inner, np.int64))
    return _joined(blocks, counts)[: size[0], : size[1], : size[2]]


@dataclass(frozen=True)
class ReconstructionLoader:
    """Loads the reconstructed inner chunks of a stored chunk for the builder, given its number.

    Parameters
    ----------
    path, checkpoint
        The version of codes, and the checkpoint that it was made with.
    levels
        How many of the stored residual levels are decoded.
    """

    path: str
    checkpoint: str
    levels: int
    device: str

    def __call__(self, chunk: int) -> Block:
        start = time.perf_counter()
        codes = open_codes(self.path, self.checkpoint, self.levels, self.device)
        layout, features = codes.cube.layout, codes.cube.features
        positions, data, valid = codes.decoded(chunk)

        corner = np.array(np.unravel_index(chunk, layout.shard_grid)) * layout.per_shard
        counts = np.minimum(layout.per_shard, np.array(layout.inner_grid) - corner)
        origins = layout.origins(np.full(len(positions), chunk), positions)
        in_grid = origins // np.array(layout.inner)
        train = codes.inner_labels[tuple(in_grid.T)] == 0
        per_voxel = np.broadcast_to(train[:, None, None, None, None], data[..., :1].shape)
        joined, mask = _joined(data, counts), _joined(per_voxel, counts)[..., 0]

        # The grid is padded to whole inner chunks; statistics are of the voxels that the original
        # cube has.
        t0, y0, x0 = (int(start) for start in corner * np.array(layout.inner))
        dates = min(joined.shape[0], layout.shape[0] - t0)
        rows = max(0, min(joined.shape[1], codes.cube.extent[0] - y0))
        columns = max(0, min(joined.shape[2], codes.cube.extent[1] - x0))
        inside = np.s_[:dates, :rows, :columns]
        facts = block_facts(joined[inside], mask[inside], t0, features)

        share = valid.mean(axis=(1, 2, 3, 4), dtype=np.float64)
        facts["valid_share"] = share.astype(np.float32).tolist()
        seconds = {"decode": time.perf_counter() - start}
        return Block(positions.tolist(), _samples(data, valid), seconds, facts)


def _samples(
    data: NDArray[np.float32], valid: NDArray[np.bool_]
) -> Iterator[dict[str, NDArray[Any]]]:
    for values, mask in zip(data, valid, strict=True):
        yield {"data": values, "valid": mask}


def _joined(blocks: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
    """Join inner chunks [n, T, Y, X, F], in C order of counts (t, y, x), to one array.

    The result has the shape [t * T, y * Y, x * X, F].
    """
    nt, ny, nx = counts.tolist()
    _, t, y, x, count = blocks.shape
    by_axis = blocks.reshape(nt, ny, nx, t, y, x, count).transpose(0, 3, 1, 4, 2, 5, 6)
    return by_axis.reshape(nt * t, ny * y, nx * x, count)


def plan_reconstruction(
    codes_path: Path | str,
    checkpoint: Path | str,
    *,
    levels: int | None = None,
    device: str = "cpu",
) -> tuple[BuildPlan, ReconstructionLoader]:
    """Return the plan of a cube version from codes, and what loads its stored chunks.

    The version has the layout, labels and georeference of the original cube, and statistics of its
    own values.
    """
    path = str(Warehouse.open(codes_path).location)
    codes = open_codes(path, str(checkpoint), levels, device)
    cube, layout = codes.cube, codes.cube.layout
    steps = [block // inner for block, inner in zip(layout.block, layout.inner, strict=True)]
    # All inner chunks of a label block have its label, so the first of each tells it.
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
