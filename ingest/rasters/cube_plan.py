"""From listed rasters to what the builder bakes: grid, dates, layers, and how the cube is cut.

Every header is opened once, and whatever would fail later is refused here: no CRS, no overlap,
missing bands, duplicate or unsorted dates, a cube smaller than one inner chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.cube_loader import CubeLoader
from ingest.rasters.dates import DatedFrame, Times, dated_frames, make_layers
from ingest.rasters.grids import Grid, crs_wkt_of, grid_of_bounds, read_extent
from ingest.rasters.label_blocks import block_labels, default_block, default_shard
from ingest.rasters.raster_listing import cube_recipe, matching_files
from ingest.rasters.readers.opening import open_raster
from ingest.rasters.settings import RasterFeature, RasterSettings, Steps
from ingest.rasters.source_layers import Frame, Layer, LayerKey
from ingest.sources.listing import SourceListing
from warehouse.errors import ConfigError, SourceError
from warehouse.format.manifest import toolchain, version_name
from warehouse.layouts.cube.arrays import cube_arrays
from warehouse.layouts.cube.geometry import CubeChunking, CubeGeometry
from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.features import Feature
from warehouse.layouts.plan import BuildPlan, SplitPlan
from warehouse.settings import BuildSettings

__all__ = ["plan_cube"]

TRAIN = 0
"""The label of blocks of the training split."""
FLOAT32_BYTES = 4
Parts = tuple[int, int, int]
"""Numbers along time, y and x."""


def plan_cube(
    listing: SourceListing, build: BuildSettings, raster: RasterSettings
) -> tuple[BuildPlan, CubeLoader]:
    """Plan the build of a listing.

    Returns
    -------
    tuple
        The plan, and the callable that makes its stored chunks.

    Raises
    ------
    SourceError, ConfigError
        For rasters that do not fit together; see the module.
    """
    root = listing.root
    grid = _grid(root, raster)
    frames = {
        feature.name: dated_frames(root, feature, raster, feature.files)
        for feature in raster.features
    }
    _check_overlap(root, grid, frames)
    times, layers = make_layers(root, raster, frames)
    layout, labels = _cut(grid, len(times), build, raster)
    cube = _geometry(raster, grid, layout, times)
    first_sources = tuple(_first_source(layers, date) for date in range(len(times)))
    splits = SplitPlan.of_chunks(
        "cube", cube_arrays(layout, build.compressor), range(layout.stored_chunks)
    )
    recipe = cube_recipe(listing, build, raster)
    version, key = version_name(recipe)
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        thresholds={"empty_dates": raster.empty_dates},
        toolchain=toolchain() | {"rasterio": recipe["decoder"]["rasterio"]},
        splits=(splits,),
        found=len(listing.pictures),
        kept=len(listing.pictures),
        summary=_summary(listing, raster, grid, layout, times),
        layout=Cube(cube, labels, first_sources, raster.empty_dates == "keep"),
    )

    # Only training chunks enter the statistics: those of held-out blocks would leak into training.
    train = (layout.inner_labels(labels) == TRAIN).astype(np.uint8)
    stamps = {file.path: (file.size, file.mtime_ns) for file in listing.files}
    loader = CubeLoader(root, grid, layout, raster.features, cube.features, layers, stamps, train)
    return plan, loader


def _geometry(
    raster: RasterSettings, grid: Grid, layout: CubeChunking, times: Times
) -> CubeGeometry:
    features = tuple(
        Feature(each.name, each.kind, each.codes, static=each.static, units=each.units)
        for each in raster.features
    )
    return CubeGeometry(
        layout,
        features,
        tuple(str(time) for time in times),
        grid.crs_wkt2,
        grid.crs_code,
        grid.transform,
        (grid.height, grid.width),
    )


def _summary(
    listing: SourceListing, raster: RasterSettings, grid: Grid, layout: CubeChunking, times: Times
) -> dict[str, object]:
    # The cube is filled up to whole inner chunks, and so are the bounds that are published.
    extended = Grid(grid.crs_wkt, grid.transform, layout.shape[1], layout.shape[2])
    return {
        "shape": dict(zip(("time", "y", "x", "feature"), layout.shape, strict=True)),
        "extent": [grid.height, grid.width],
        "bounds": list(extended.bounds()),
        "first": str(times[0]),
        "last": str(times[-1]),
        "sources": len(listing.pictures),
        "static": {each.name: "repeated along time" for each in raster.features if each.static},
        "resampling": {
            each.name: each.method for each in raster.features if each.index is None or each.files
        },
        "guard": raster.guard,
        "held_out_dates": raster.held_out_dates,
    }


def _first_source(layers: Mapping[LayerKey, Layer], date: int) -> str:
    """Return the first file that shows a date; the empty string where only static features do."""
    frames = [layer.frame(date) for layer in layers.values() if not layer.static]
    return next((frame.path for frame in frames if frame is not None), "")


def _grid(root: Path, raster: RasterSettings) -> Grid:
    declared = raster.grid
    if declared.like is not None:
        grid = open_raster(root / declared.like, _extent(root, raster, None)).grid
    elif declared.geojson is not None and declared.resolution is not None:
        wkt, bounds = read_extent(root / declared.geojson)
        grid = grid_of_bounds(wkt, bounds, declared.resolution, "raster.grid")
    elif declared.geojson is None and declared.crs is not None:
        assert declared.bounds is not None
        assert declared.resolution is not None
        wkt = crs_wkt_of(declared.crs, "raster.grid.crs")
        grid = grid_of_bounds(wkt, declared.bounds, declared.resolution, "raster.grid")
    else:
        grid = _first_grid(root, raster)
    # Stored coordinates are one axis of x and one of y, which a rotated grid does not have.
    if not grid.is_north_up:
        raise ConfigError(
            "the grid is turned or upside down",
            where="raster.grid",
            found=list(grid.transform),
            remedy="declare one with raster.grid {crs, resolution, bounds}",
        )
    return grid


def _first_grid(root: Path, raster: RasterSettings) -> Grid:
    """Return the grid of the first source, provided that all share its CRS.

    Sources of different grids in one CRS are common (Sentinel-2 has 10, 20 and 60 m), and the first
    is as good as any. Across CRS there is no obvious choice, so the user has to make it.
    """
    first: tuple[str, Grid] | None = None
    for feature in raster.features:
        for path in matching_files(root, feature.files) if feature.files else ():
            grid = open_raster(root / path, _extent(root, raster, feature)).grid
            if first is None:
                first = path, grid
            elif grid.crs != first[1].crs:
                raise SourceError(
                    "sources have different CRS and no grid is declared",
                    where=root / path,
                    expected=f"that of {first[0]}",
                    remedy="declare raster.grid: {like: FILE} or {crs, resolution, bounds}",
                )
    if first is None:
        raise ConfigError(
            "no feature reads a file",
            where="raster.features",
            remedy="give at least one feature files",
        )
    return first[1]


def _extent(root: Path, raster: RasterSettings, feature: RasterFeature | None) -> Path | None:
    """Return the file with the rectangle of a feature's .npy: its own, or that of the grid."""
    name = feature.extent if feature else None
    name = name or raster.grid.geojson
    return root / name if name else None


def _check_overlap(root: Path, grid: Grid, frames: Mapping[str, Sequence[DatedFrame]]) -> None:
    # A source beside the grid is a mistake in one of the two, and would leave the cube empty.
    for found in frames.values():
        for frame, _ in found:
            # All steps of a file share its grid, and a NetCDF may have thousands of them.
            if frame.step in {None, 0}:
                _check_frame(root, grid, frame)


def _check_frame(root: Path, grid: Grid, frame: Frame) -> None:
    source = open_raster(root / frame.path, root / frame.extent if frame.extent else None)
    if source.grid.window_of(grid, (0, 0, grid.height, grid.width)) is None:
        raise SourceError(
            "a raster does not overlap the grid",
            where=root / frame.path,
            expected=f"something within {list(grid.bounds())}",
            found=f"{list(source.grid.bounds())} in its own CRS",
            remedy="correct raster.grid, or leave the file out",
        )


def _cut(
    grid: Grid, dates: int, build: BuildSettings, raster: RasterSettings
) -> tuple[CubeChunking, NDArray[np.uint8]]:
    """Cut the cube into inner chunks, stored chunks and label blocks.

    Returns
    -------
    tuple
        The layout, and the label of each block, uint8 [time, y, x].
    """
    inner = raster.chunk.time or 5, raster.chunk.y or 32, raster.chunk.x or 32
    extent = dates, grid.height, grid.width
    _check_size(extent, inner)
    inner_grid = -(-extent[0] // inner[0]), -(-extent[1] // inner[1]), -(-extent[2] // inner[2])
    features = len(raster.features)
    inner_bytes = FLOAT32_BYTES * inner[0] * inner[1] * inner[2] * features

    shard = _chosen(raster.shard, inner, inner_grid, default_shard(inner_grid, inner_bytes))
    block = _chosen(raster.block, inner, inner_grid, default_block(inner_grid))
    # Rounded up to whole inner chunks: one that holds both kinds of dates would show the model some
    # of those it is tested on.
    held_out = -(-raster.held_out_dates // inner[0])
    labels, fine = block_labels(
        inner_grid, block, build.splits, build.seed, guard=raster.guard, held_out=held_out
    )
    if not (labels == TRAIN).any():
        raise ConfigError(
            "no inner chunk is left for training",
            where="raster.guard, raster.held_out_dates",
            remedy="lower them, or the block",
        )

    # Rows and columns are filled up with missing values; dates are not, since each is a real one.
    shape = (dates, inner_grid[1] * inner[1], inner_grid[2] * inner[2], features)
    stored, labelled = _voxels(shard, inner), _voxels(fine, inner)
    return CubeChunking(shape, inner, stored, labelled, raster.chunk.feature), labels


def _check_size(extent: Parts, inner: Parts) -> None:
    for axis, found, needed in zip(("dates", "rows", "columns"), extent, inner, strict=True):
        if found < needed:
            raise SourceError(
                f"the cube has fewer {axis} than one inner chunk",
                where="raster.chunk",
                expected=f"at least {needed}",
                found=found,
                remedy="lower raster.chunk, or widen the grid",
            )


def _chosen(wanted: Steps, inner: Parts, inner_grid: Parts, default: Parts) -> Parts:
    """Return the size that the settings ask for, in inner chunks and at most the whole cube."""
    sizes = wanted.time, wanted.y, wanted.x
    time, y, x = (
        part if size is None else min(size // step, count)
        for size, step, part, count in zip(sizes, inner, default, inner_grid, strict=True)
    )
    return time, y, x


def _voxels(parts: Parts, inner: Parts) -> Parts:
    return parts[0] * inner[0], parts[1] * inner[1], parts[2] * inner[2]
