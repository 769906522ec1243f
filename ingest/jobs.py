"""What there is to build: a folder of pictures or a stack of rasters, as the one thing `build_zarr`
drives.

A job has listed and hashed its sources, so that it knows the version's name; planning (headers,
pixels) comes later and only if the version is not there. Heavy imports wait for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from ingest.rasters.settings import RasterSettings
from warehouse.format.schema import BOXLESS
from warehouse.settings import BuildSettings
from warehouse.write.bake import BuildPlan, LoadSample

__all__ = ["CubeJob", "Job", "PictureJob", "open_job"]


class Job(Protocol):
    """recipe: what names the version; noun: what its progress counts; found: one line on the
    sources; trainer: the next command; threads: whether chunks may be made beside each other in one
    process."""

    recipe: dict[str, Any]
    threads: bool
    noun: str
    found: str
    trainer: str

    def plan(self, unreadable: Mapping[str, Any]) -> BuildPlan:
        """Raises what the sources deserve: SourceError, ThresholdError, ConfigError."""

    def loader(self, plan: BuildPlan) -> LoadSample:
        """The load function of a plan of this job."""

    @property
    def warm_up(self) -> Callable[[], None]:
        """Imports what a build worker needs."""


def open_job(build: BuildSettings, raster: RasterSettings) -> Job:
    """`format: raster` is a cube, and so is `auto` once features are declared."""
    if build.format == "raster" or (build.format == "auto" and raster.features):
        return CubeJob(build, raster)
    return PictureJob(build)


class PictureJob:
    """Labelled pictures in splits."""

    noun, threads = "pictures", True

    def __init__(self, build: BuildSettings) -> None:
        from ingest.pictures.plan import recipe_of
        from ingest.sources import list_sources

        self.build, self.listing = build, list_sources(build)
        self.recipe = recipe_of(self.listing, build)
        boxless = self.listing.format in BOXLESS
        self.trainer = (
            "extract_features --features.warehouse"
            if boxless
            else "train_detector --detector.warehouse"
        )
        self.found = (
            f"{len(self.listing.pictures)} pictures as {self.listing.format} in {self.listing.root}"
        )

    def plan(self, unreadable: Mapping[str, Any]) -> BuildPlan:
        from ingest.pictures.plan import make_plan
        from ingest.pictures.validate import check_thresholds, scan

        scanned = scan(self.listing, self.build, unreadable=dict(unreadable))
        check_thresholds(scanned, self.build)
        return make_plan(self.listing, scanned, self.build)

    def loader(self, plan: BuildPlan) -> LoadSample:
        from ingest.pictures.plan import make_loader

        return make_loader(self.listing, self.build, plan)

    @property
    def warm_up(self) -> Callable[[], None]:
        from ingest.pictures.images import warm_up

        return warm_up


class CubeJob:
    """Rasters stacked into one cube."""

    # GDAL's handles are not shared between threads.
    noun, trainer, threads = "stored chunks", "train_vqvae --vqvae.warehouse", False

    def __init__(self, build: BuildSettings, raster: RasterSettings) -> None:
        from ingest.rasters.plan import cube_recipe, list_rasters

        self.build, self.raster = build, raster
        self.listing = list_rasters(build, raster)
        self.recipe = cube_recipe(self.listing, build, raster)
        self.found = f"{len(self.listing.pictures)} rasters for {len(raster.features)} features in {self.listing.root}"

    def plan(self, unreadable: Mapping[str, Any]) -> BuildPlan:
        from ingest.rasters.plan import plan_cube

        plan, self._load = plan_cube(self.listing, self.build, self.raster)
        return plan

    def loader(self, plan: BuildPlan) -> LoadSample:
        return self._load

    @property
    def warm_up(self) -> Callable[[], None]:
        return partial(__import__, "rasterio.warp")
