"""What there is to build: a folder of pictures or a stack of rasters, behind one interface.

A job has listed and hashed its sources, so it knows the version's name. Planning reads headers and
pixels, so it comes later, and only if that version does not exist; heavy imports wait for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ingest.rasters.settings import RasterSettings
from ingest.records.formats import AUTO, RASTER, get_format
from warehouse.errors import PictureError
from warehouse.layouts.plan import BuildPlan, LoadSample
from warehouse.settings import BuildSettings

__all__ = ["CubeJob", "Job", "PictureJob", "open_job"]


class Job(Protocol):
    """What `build_zarr` needs to know of what it builds.

    Attributes
    ----------
    recipe
        Everything that decides the version's content; its hash names the version.
    noun
        What the progress counts.
    found
        One line about the sources.
    trainer
        The command that usually comes next, up to the path of the version.
    threads
        Whether one process may make several chunks at the same time.
    """

    recipe: dict[str, Any]
    noun: str
    found: str
    trainer: str
    threads: bool

    def plan(self, unreadable: Mapping[str, PictureError]) -> BuildPlan:
        """Plan the build.

        Parameters
        ----------
        unreadable
            Sources that failed in an earlier attempt to bake, with their errors, by path.

        Raises
        ------
        SourceError, ThresholdError, ConfigError
            For sources that cannot be built.
        """

    def loader(self, plan: BuildPlan) -> LoadSample:
        """Return the function that makes the samples of a plan of this job."""

    @property
    def preload(self) -> Callable[[], None]:
        """The function that imports what a build worker needs."""


def open_job(build: BuildSettings, raster: RasterSettings) -> Job:
    """List and hash the sources of a build.

    `build.format: raster` makes a cube, and so does `auto` where features are declared.

    Raises
    ------
    ConfigError
        If there is no such format, before anything is read.
    SourceError
        For sources that cannot be listed.
    """
    if build.format == RASTER or (build.format == AUTO and raster.features):
        return CubeJob(build, raster)
    if build.format != AUTO:
        get_format(build.format)
    return PictureJob(build)


class PictureJob:
    """Labelled pictures in splits."""

    noun, threads = "pictures", True

    def __init__(self, build: BuildSettings) -> None:
        from ingest.pictures.picture_plan import recipe_of
        from ingest.records.list_sources import list_sources

        self.build, self.listing = build, list_sources(build)
        self.recipe = recipe_of(self.listing, build)
        listing = self.listing
        self.found = f"{len(listing.pictures)} pictures as {listing.format} in {listing.root}"
        self.trainer = "extract_features --features.warehouse"
        if get_format(listing.format).has_boxes:
            self.trainer = "train_detector --detector.warehouse"

    def plan(self, unreadable: Mapping[str, PictureError]) -> BuildPlan:
        """Judge every picture and plan the build; see `Job.plan`."""
        from ingest.pictures.picture_plan import make_plan
        from ingest.pictures.thresholds import check_thresholds
        from ingest.pictures.validate import scan

        scanned = scan(self.listing, self.build, unreadable=unreadable)
        check_thresholds(scanned, self.build)
        return make_plan(self.listing, scanned, self.build)

    def loader(self, plan: BuildPlan) -> LoadSample:
        """Return the function that decodes and letterboxes a picture."""
        from ingest.pictures.picture_plan import make_loader

        return make_loader(self.listing, self.build, plan)

    @property
    def preload(self) -> Callable[[], None]:
        """The function that imports the decoder and the resizer."""
        from ingest.pictures.images import preload

        return preload


class CubeJob:
    """Rasters stacked into one cube."""

    # GDAL's handles are not shared between threads.
    noun, trainer, threads = "stored chunks", "train_vqvae --vqvae.warehouse", False

    def __init__(self, build: BuildSettings, raster: RasterSettings) -> None:
        from ingest.rasters.raster_listing import cube_recipe, list_rasters

        self.build, self.raster = build, raster
        self.listing = list_rasters(build, raster)
        self.recipe = cube_recipe(self.listing, build, raster)
        rasters, features = len(self.listing.pictures), len(raster.features)
        self.found = f"{rasters} rasters for {features} features in {self.listing.root}"

    def plan(self, unreadable: Mapping[str, PictureError]) -> BuildPlan:
        """Open every raster's header and plan the build; see `Job.plan`."""
        from ingest.rasters.cube_plan import plan_cube

        plan, self._load = plan_cube(self.listing, self.build, self.raster)
        return plan

    def loader(self, plan: BuildPlan) -> LoadSample:
        """Return the function that stacks a stored chunk. `plan` must have been called."""
        return self._load

    @property
    def preload(self) -> Callable[[], None]:
        """The function that imports GDAL."""
        return _import_gdal


def _import_gdal() -> None:
    import rasterio.warp  # noqa: F401
