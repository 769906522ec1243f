"""The files that the `raster` section names, and the recipe of the version made of them.

Only names and bytes are read, so that rebuilding unchanged data returns without opening a raster.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingest.rasters.settings import RASTER_SUFFIXES, RasterSettings
from ingest.sources.files import input_root
from ingest.sources.listing import SourceListing, hash_sources
from warehouse.errors import ConfigError, SourceError
from warehouse.format.manifest import code_version
from warehouse.format.schema import FORMAT_VERSION
from warehouse.section import PICTURES_ONLY
from warehouse.settings import BuildSettings

__all__ = ["cube_recipe", "list_rasters", "matching_files"]


def list_rasters(build: BuildSettings, raster: RasterSettings) -> SourceListing:
    """Find and hash every file that the section names.

    Raises
    ------
    ConfigError
        If no features are declared, or if a pattern leads out of the input root.
    SourceError
        If a pattern matches nothing, or a file cannot be read.
    """
    if not raster.features:
        raise ConfigError(
            "no features are declared",
            where="raster.features",
            remedy="list them in your config file, as docs/format.md shows",
        )
    root = input_root(build)
    # A set: one file may hold the bands of several features, and is hashed once.
    named: set[str] = set()
    for feature in raster.features:
        for pattern in (feature.files, feature.mask):
            if pattern is not None:
                named.update(matching_files(root, pattern))
        if feature.extent:
            named.add(feature.extent)
    named.update(path for path in (raster.grid.like, raster.grid.geojson, raster.time.file) if path)

    # Extents and lists of dates are no rasters, but they decide the content, so they are hashed.
    rasters = tuple(sorted(path for path in named if _suffix(path) in RASTER_SUFFIXES))
    listed = [inside for path in sorted(named) for inside in _files_of(root, path)]
    stats = {path: _stat(root, path) for path in listed}
    files = hash_sources(root, listed, stats, rehash=build.rehash)
    return SourceListing(root, "raster", rasters, (), files)


def matching_files(root: Path, pattern: str) -> list[str]:
    """Return the rasters that a glob pattern matches, as sorted paths relative to the root.

    Raises
    ------
    ConfigError
        If the pattern leads out of the root.
    SourceError
        If it matches nothing.
    """
    if pattern.startswith(("/", "~")) or ".." in pattern.split("/"):
        raise ConfigError(
            "a feature's files lead out of the input folder",
            where=pattern,
            remedy="name them relative to build.input_root",
        )
    found = sorted(
        path.relative_to(root).as_posix()
        for path in root.glob(pattern)
        if _suffix(path.name) in RASTER_SUFFIXES
    )
    if not found:
        raise SourceError(
            "no raster matches",
            where=root / pattern,
            expected=f"files ending in {' '.join(RASTER_SUFFIXES)}",
            remedy="check raster.features and --build.input_root",
        )
    return found


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()


def _files_of(root: Path, path: str) -> list[str]:
    """Return the file itself, or the files of a Zarr folder."""
    if not (root / path).is_dir():
        return [path]
    # Sorted, because the order of a folder differs between file systems, and a recipe must not.
    return sorted(
        (Path(folder) / name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root / path)
        for name in names
    )


def _stat(root: Path, path: str) -> os.stat_result:
    # A version must be reproducible from its input root alone.
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
    """Return everything that decides the version's content; its hash is the version's name."""
    return {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "sources": listing.fingerprint,
        "format": listing.format,
        # Settings of pictures do not change a cube, so its name does not depend on them.
        "settings": build.content(leave_out={PICTURES_ONLY}) | {"raster": raster.content()},
        # GDAL comes with rasterio, and another release may decode or resample otherwise.
        "decoder": {"rasterio": version("rasterio")},
    }
