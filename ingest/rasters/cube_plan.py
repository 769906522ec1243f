"""From the `raster` section and its files to what the builder bakes: listing, grid, dates, layers,
splits, the version's name.

`list_rasters` looks at names and bytes only, so that "already built" answers without opening a
raster; `plan_cube` opens every header once and refuses whatever would fail later: no CRS, no
overlap, missing bands, duplicate or unsorted dates, a cube smaller than one inner chunk.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.cube_loader import CubeLoader, Frame, Layer
from ingest.rasters.grids import Grid, crs_wkt_of, grid_of_bounds, read_extent
from ingest.rasters.label_blocks import block_labels, default_block, default_shard
from ingest.rasters.readers import SUFFIXES, open_raster
from ingest.rasters.settings import RasterFeature, RasterSettings
from ingest.sources.files import input_root
from ingest.sources.hashes import hash_files
from ingest.sources.listing import SourceFile, SourceListing
from warehouse.errors import ConfigError, SourceError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION
from warehouse.layouts.cube_geometry import Cube, CubeLayout, CubePlan, Feature, cube_arrays
from warehouse.section import PICTURES_ONLY
from warehouse.settings import BuildSettings
from warehouse.write.bake import BuildPlan, SplitPlan

__all__ = ["cube_recipe", "list_rasters", "plan_cube"]

EPOCH = np.datetime64("1970-01-01", "s")
Times = NDArray[np.datetime64]


def list_rasters(build: BuildSettings, raster: RasterSettings) -> SourceListing:
    """Every file the section names, hashed.

    Raises ConfigError without features, SourceError for globs that match nothing.
    """
    if not raster.features:
        raise ConfigError(
            "no features are declared",
            where="raster.features",
            remedy="list them in your config file, as docs/format.md shows",
        )
    root = input_root(build)
    named: set[str] = set()
    for feature in raster.features:
        for pattern in (feature.files, feature.mask):
            if pattern is not None:
                named.update(_matches(root, pattern))
        if feature.extent:
            named.add(feature.extent)
    named.update(path for path in (raster.grid.like, raster.grid.geojson, raster.time.file) if path)
    rasters = tuple(sorted(path for path in named if Path(path).suffix.lower() in SUFFIXES))
    listed = [inside for path in sorted(named) for inside in _files_of(root, path)]
    stats = [(root / path, _stat(root, path)) for path in listed]
    digests = hash_files(stats, rehash=build.rehash)
    files = tuple(
        SourceFile(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, digest)
        for path, (_, stat), digest in zip(listed, stats, digests, strict=True)
    )
    return SourceListing(root, "raster", rasters, (), files)


def _matches(root: Path, pattern: str) -> list[str]:
    if pattern.startswith(("/", "~")) or ".." in pattern.split("/"):
        raise ConfigError(
            "a feature's files lead out of the input folder",
            where=pattern,
            remedy="name them relative to build.input_root",
        )
    found = sorted(
        path.relative_to(root).as_posix()
        for path in root.glob(pattern)
        if path.suffix.lower() in SUFFIXES
    )
    if not found:
        raise SourceError(
            "no raster matches",
            where=root / pattern,
            expected=f"files ending in {' '.join(SUFFIXES)}",
            remedy="check raster.features and --build.input_root",
        )
    return found


def _files_of(root: Path, path: str) -> list[str]:
    """The file, or the files of a Zarr folder."""
    if not (root / path).is_dir():
        return [path]
    return sorted(
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root / path)
        for name in names
    )


def _stat(root: Path, path: str) -> os.stat_result:
    real = os.path.realpath(root / path)
    if os.path.commonpath([real, os.path.realpath(root)]) != os.path.realpath(root):
        raise SourceError(
            "a link leads out of the input folder",
            where=root / path,
            found=real,
            remedy="copy what it points to into the folder",
        )
    try:
        return os.stat(real)
    except OSError as error:
        raise SourceError(
            "a source file cannot be read",
            where=root / path,
            found=error.strerror,
            remedy="check the raster section",
        ) from None


def cube_recipe(
    listing: SourceListing, build: BuildSettings, raster: RasterSettings
) -> dict[str, Any]:
    """Everything that decides the version's content; its hash is the version's name."""
    from importlib.metadata import version

    return {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "sources": listing.fingerprint,
        "format": "raster",
        "settings": build.content(leave_out={PICTURES_ONLY}) | {"raster": raster.content()},
        "decoder": {"rasterio": version("rasterio")},
    }


def plan_cube(
    listing: SourceListing, build: BuildSettings, raster: RasterSettings
) -> tuple[BuildPlan, CubeLoader]:
    """The build of a listing and its `load`. Raises SourceError, ConfigError: see the module."""
    root = listing.root
    grid = _grid(root, raster)
    per_feature = {feature.name: _frames(root, feature, raster) for feature in raster.features}
    for frames in per_feature.values():
        for frame, _ in frames:
            _check_frame(root, grid, frame)
    times, layers = _layers(root, raster, per_feature)
    layout, labels = _cut(grid, len(times), build, raster)
    features = tuple(
        Feature(each.name, each.kind, each.codes, static=each.static, units=each.units)
        for each in raster.features
    )
    iso = tuple(str(time) for time in times)
    extended = Grid(grid.crs_wkt, grid.transform, layout.shape[1], layout.shape[2])
    cube = Cube(
        layout,
        features,
        iso,
        grid.crs_wkt2,
        grid.crs_code,
        grid.transform,
        (grid.height, grid.width),
    )
    recipe = cube_recipe(listing, build, raster)
    version, key = version_name(recipe)
    numbers = tuple(range(layout.stored_chunks))
    nothing: tuple[dict[str, Any], ...] = ({},) * len(numbers)
    split = SplitPlan(
        "cube",
        tuple(cube_arrays(layout, build.compressor)),
        numbers,
        ("",) * len(numbers),
        nothing,
        whole_chunks=True,
    )
    summary = {
        "shape": dict(zip(("time", "y", "x", "feature"), layout.shape, strict=True)),
        "extent": [grid.height, grid.width],
        "bounds": list(extended.bounds()),
        "first": iso[0],
        "last": iso[-1],
        "sources": len(listing.pictures),
        "static": {feature.name: "repeated along time" for feature in features if feature.static},
        "resampling": {
            each.name: each.method for each in raster.features if each.index is None or each.files
        },
        "guard": raster.guard,
        "held_out_dates": raster.held_out_dates,
    }
    sources = tuple(_date_source(layers, at) for at in range(len(times)))
    plan = BuildPlan(
        version,
        key,
        recipe,
        {"empty_dates": raster.empty_dates},
        toolchain() | {"rasterio": recipe["decoder"]["rasterio"]},
        (split,),
        (),
        len(listing.pictures),
        len(listing.pictures),
        (),
        summary,
        {},
        cube=CubePlan(cube, labels, sources, raster.empty_dates == "keep"),
    )
    stamps = {file.path: (file.size, file.mtime_ns) for file in listing.files}
    train = (layout.inner_labels(labels) == 0).astype(np.uint8)
    return plan, CubeLoader(root, grid, layout, raster.features, features, layers, stamps, train)


def _grid(root: Path, raster: RasterSettings) -> Grid:
    declared = raster.grid
    if declared.like is not None:
        found = open_raster(root / declared.like, _extent(root, raster, None)).grid
    elif declared.geojson is not None and declared.resolution is not None:
        wkt, bounds = read_extent(root / declared.geojson)
        found = grid_of_bounds(wkt, bounds, declared.resolution, "raster.grid")
    elif declared.geojson is None and declared.crs is not None:
        assert declared.bounds is not None
        assert declared.resolution is not None
        found = grid_of_bounds(
            crs_wkt_of(declared.crs, "raster.grid.crs"),
            declared.bounds,
            declared.resolution,
            "raster.grid",
        )
    else:
        found = _first_grid(root, raster)
    if not found.is_north_up:
        raise ConfigError(
            "the grid is turned or upside down",
            where="raster.grid",
            found=list(found.transform),
            remedy="declare one with raster.grid {crs, resolution, bounds}",
        )
    return found


def _first_grid(root: Path, raster: RasterSettings) -> Grid:
    """The first source's grid, when all share its CRS."""
    first: tuple[str, Grid] | None = None
    for feature in raster.features:
        for path in _matches(root, feature.files) if feature.files else ():
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
    name = (feature.extent if feature else None) or raster.grid.geojson
    return root / name if name else None


def _frames(
    root: Path, feature: RasterFeature, raster: RasterSettings, pattern: str | None = None
) -> list[tuple[Frame, Any]]:
    """(frame, date) of every step of every file of a feature or its mask.

    The date of static ones is None.
    """
    pattern = pattern or feature.files
    if pattern is None:
        return []
    extent = feature.extent or raster.grid.geojson
    found: list[tuple[Frame, Any]] = []
    for path in _matches(root, pattern):
        extent_of = extent if path.endswith(".npy") else None
        source = open_raster(root / path, root / extent_of if extent_of else None)
        for band in _bands(feature) if pattern == feature.files else [1]:
            source.check(band)
        if feature.static:
            found.append((Frame(path, None if source.steps is None else 0, extent_of), None))
        elif source.steps is None:
            found.append((Frame(path, None, extent_of), _date_of(root, path, raster)))
        else:
            times = (
                source.times
                if source.times is not None
                else _times_file(root, raster, source.steps, path)
            )
            _check_sorted(
                times, root / path if source.times is not None else root / str(raster.time.file)
            )
            found += [(Frame(path, step, extent_of), time) for step, time in enumerate(times)]
    if feature.static and len(found) > 1:
        raise SourceError(
            "a static feature has more than one file",
            where=root / pattern,
            found=f"{len(found)} files",
            remedy="narrow its files to one, or leave static away",
        )
    seen: dict[Any, Frame] = {}
    for frame, time in found:
        if not feature.static and time in seen:
            raise SourceError(
                f"two sources of feature {feature.name!r} have the date {time}",
                where=root / frame.path,
                found=f"also {seen[time].path}",
                remedy="keep one of them, or let raster.time.pattern tell them apart",
            )
        seen[time] = frame
    return found


def _bands(feature: RasterFeature) -> list[int | str]:
    return (
        [value for value in feature.inputs.values() if isinstance(value, int)]
        if feature.index
        else [feature.band]
    )


def _date_of(root: Path, path: str, raster: RasterSettings) -> np.datetime64:
    match = re.search(raster.time.pattern, Path(path).name)
    try:
        if match is None:
            raise ValueError(f"the name does not match {raster.time.pattern}")
        return _instant(dt.datetime.strptime(match["date"], raster.time.format))
    except ValueError as error:
        raise SourceError(
            "a raster's name holds no date",
            where=root / path,
            found=str(error),
            remedy="correct raster.time.pattern and format, or make the feature static",
        ) from None


def _instant(time: dt.datetime) -> np.datetime64:
    """In UTC; a time without an offset is taken as it stands."""
    return np.datetime64(
        time if time.tzinfo is None else time.astimezone(dt.UTC).replace(tzinfo=None), "s"
    )


def _times_file(root: Path, raster: RasterSettings, steps: int, path: str) -> Times:
    if raster.time.file is None:
        raise SourceError(
            "a source with many dates does not say which",
            where=root / path,
            remedy="give raster.time.file, a JSON list of dates",
        )
    where = root / raster.time.file
    try:
        times = np.array(
            [_instant(dt.datetime.fromisoformat(text)) for text in json.loads(where.read_bytes())]
        )
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            "the file of dates does not parse",
            where=where,
            found=str(error)[:120],
            remedy="make it a JSON list of ISO dates",
        ) from None
    if len(times) != steps:
        raise SourceError(
            "dates and source disagree",
            where=where,
            expected=f"{steps} dates as in {path}",
            found=len(times),
            remedy="give one date a step",
        )
    return times


def _check_sorted(times: Times, where: Path) -> None:
    if np.isnat(times).any():
        raise SourceError(
            "a date is missing",
            where=where,
            found=f"none at step {int(np.argmax(np.isnat(times)))}",
            remedy="give every step its date",
        )
    steps = np.diff(times)
    if (steps == np.timedelta64(0, "s")).any():
        raise SourceError(
            "a date stands twice",
            where=where,
            found=str(times[int(np.argmax(steps == np.timedelta64(0, "s")))]),
            remedy="leave one of the two steps out",
        )
    if (steps < np.timedelta64(0, "s")).any():
        late = times[int(np.argmax(steps < np.timedelta64(0, "s"))) + 1]
        raise SourceError(
            "time is not sorted",
            where=where,
            found=f"{late} comes too late",
            remedy="sort the steps by date",
        )


def _check_frame(root: Path, grid: Grid, frame: Frame) -> None:
    """Raises SourceError where a file does not meet the grid."""
    source = open_raster(root / frame.path, root / frame.extent if frame.extent else None)
    if (
        frame.step in {None, 0}
        and source.grid.window_of(grid, (0, 0, grid.height, grid.width)) is None
    ):
        raise SourceError(
            "a raster does not overlap the grid",
            where=root / frame.path,
            expected=f"something within {list(grid.bounds())}",
            found=f"{list(source.grid.bounds())} in its own CRS",
            remedy="correct raster.grid, or leave the file out",
        )


def _layers(
    root: Path, raster: RasterSettings, per_feature: dict[str, list[tuple[Frame, Any]]]
) -> tuple[Times, dict[tuple[str, str], Layer]]:
    """(dates, sorted; layers by feature and role)."""
    masks = {
        feature.name: _frames(root, feature, raster, feature.mask)
        for feature in raster.features
        if feature.mask
    }
    times = np.array(
        sorted({time for frames in per_feature.values() for _, time in frames if time is not None}),
        "datetime64[s]",
    )
    if not times.size:
        times = np.array([EPOCH])
    layers: dict[tuple[str, str], Layer] = {}
    for feature in raster.features:
        nodata = None if feature.nodata is None else float(feature.nodata)
        roles = (
            {role: band for role, band in feature.inputs.items() if isinstance(band, int)}
            if feature.index
            else {"": feature.band}
        )
        for role, band in roles.items():
            frames = _by_date(per_feature[feature.name], times, feature.static)
            layers[feature.name, role] = Layer(
                frames, band, feature.method, nodata, feature.static, feature.kind == "categorical"
            )
        if feature.mask:
            layers[feature.name, "mask"] = Layer(
                _by_date(masks[feature.name], times, feature.static),
                1,
                "nearest",
                None,
                feature.static,
            )
    return times, layers


def _by_date(
    frames: Sequence[tuple[Frame, Any]], times: Times, static: bool
) -> tuple[Frame | None, ...]:
    if static:
        return (frames[0][0],)
    known = {time: frame for frame, time in frames}
    return tuple(known.get(time) for time in times)


def _date_source(layers: dict[tuple[str, str], Layer], date: int) -> str:
    frames = [layer.frame(date) for layer in layers.values() if not layer.static]
    return next((frame.path for frame in frames if frame is not None), "")


def _cut(
    grid: Grid, dates: int, build: BuildSettings, raster: RasterSettings
) -> tuple[CubeLayout, NDArray[np.uint8]]:
    inner = raster.chunk.time or 5, raster.chunk.y or 32, raster.chunk.x or 32
    for axis, found, needed in zip(
        ("dates", "rows", "columns"), (dates, grid.height, grid.width), inner, strict=True
    ):
        if found < needed:
            raise SourceError(
                f"the cube has fewer {axis} than one inner chunk",
                where="raster.chunk",
                expected=f"at least {needed}",
                found=found,
                remedy="lower raster.chunk, or widen the grid",
            )
    inner_grid = -(-dates // inner[0]), -(-grid.height // inner[1]), -(-grid.width // inner[2])
    shape = (dates, inner_grid[1] * inner[1], inner_grid[2] * inner[2], len(raster.features))

    def chosen(wanted: Any, default: tuple[int, int, int]) -> tuple[int, int, int]:
        sizes = [getattr(wanted, axis) for axis in ("time", "y", "x")]
        t, y, x = (
            part if size is None else min(size // step, count)
            for size, step, part, count in zip(sizes, inner, default, inner_grid, strict=True)
        )
        return t, y, x

    shard = chosen(
        raster.shard,
        default_shard(inner_grid, 4 * inner[0] * inner[1] * inner[2] * len(raster.features)),
    )
    block = chosen(raster.block, default_block(inner_grid))
    held_out = -(-raster.held_out_dates // inner[0])
    labels, fine = block_labels(
        inner_grid, block, build.splits, build.seed, guard=raster.guard, held_out=held_out
    )
    if not (labels == 0).any():
        raise ConfigError(
            "no inner chunk is left for training",
            where="raster.guard, raster.held_out_dates",
            remedy="lower them, or the block",
        )

    def voxels(parts: tuple[int, int, int]) -> tuple[int, int, int]:
        return parts[0] * inner[0], parts[1] * inner[1], parts[2] * inner[2]

    return CubeLayout(shape, inner, voxels(shard), voxels(fine), raster.chunk.feature), labels
