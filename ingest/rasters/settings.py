"""The `raster` section: which grid, which dates, which features, and how the cube is cut.

A feature is one column of the cube. It is read from `files` (a band of each) or computed from
others (`index`). Everything here but `empty_dates` decides what is written, and so the version's
name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from warehouse.section import ADDED_LATER, NOT_CONTENT, Section

__all__ = ["INDICES", "RASTER_SUFFIXES", "RasterFeature", "RasterSettings", "Steps"]

RASTER_SUFFIXES = {
    ".tif": "tiff",
    ".tiff": "tiff",
    ".jp2": "tiff",
    ".npy": "npy",
    ".nc": "xarray",
    ".zarr": "xarray",
}
"""Extension of a raster -> what reads it."""

INDICES: dict[str, tuple[str, ...]] = {
    "ndvi": ("red", "nir"),
    "ndwi": ("green", "nir"),
    "cover": ("red", "nir"),
    "classes": ("source",),
}
"""Name of an index -> the inputs it needs."""
EXACT_INTEGERS = 1 << 24
"""Up to here float32, in which codes are stored, holds every integer."""
Resampling = Literal["nearest", "mode", "bilinear", "average"]
QUANTITY, CATEGORY = ("bilinear", "average", "nearest"), ("nearest", "mode")


class RasterGrid(Section):
    """The grid of the cube: that of a file, or one that is described.

    Where every key is null, it is the grid of the first source, provided that all share a CRS.
    """

    like: str | None = Field(
        None, description="Raster below build.input_root that defines the grid."
    )
    crs: str | None = Field(None, description="Coordinate reference system, such as EPSG:32633.")
    resolution: float | None = Field(
        None, gt=0, description="Length of a pixel's side in units of the CRS."
    )
    bounds: tuple[float, float, float, float] | None = Field(
        None, description="Left, bottom, right and top in units of the CRS."
    )
    geojson: str | None = Field(
        None,
        description=(
            "File with a rectangle and its CRS; without resolution, the first .npy file sets the "
            "number of pixels."
        ),
    )

    @model_validator(mode="after")
    def _one_way(self) -> RasterGrid:
        # Two descriptions of one grid could contradict each other, and one would be ignored.
        named = [self.crs, self.resolution, self.bounds]
        if self.like is not None and (
            self.geojson is not None or any(each is not None for each in named)
        ):
            raise ValueError("like takes everything from its file: give nothing else")
        if self.geojson is not None and (self.crs is not None or self.bounds is not None):
            raise ValueError("geojson gives crs and bounds: only resolution may stand beside it")
        if (
            self.like is None
            and self.geojson is None
            and any(each is not None for each in named)
            and None in named
        ):
            raise ValueError("crs, resolution and bounds belong together")
        return self


class RasterTime(Section):
    """Where dates come from: file names, or a file for sources that hold many dates."""

    pattern: str = Field(
        r"(?P<date>\d{8})",
        description="Regular expression with a group named date, searched in each file name.",
    )
    format: str = Field("%Y%m%d", description="Format of the date, in the notation of strptime.")
    file: str | None = Field(
        None, description="JSON file with a list of ISO dates, for .npy sources."
    )

    @field_validator("pattern")
    @classmethod
    def _has_a_date(cls, value: str) -> str:
        # Compiled here, so that a mistake is named with its key and not for the first file.
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if "date" not in groups:
            raise ValueError("the pattern needs a group (?P<date>...)")
        return value


class RasterFeature(Section):
    """One feature, which is read from `files` or computed as an `index`.

    An index takes bands of `files`, as numbers, or features that stand above it, as names.
    """

    name: str = Field(min_length=1, max_length=64, description="Name of the feature.")
    files: str | None = Field(
        None, description="Glob pattern of the source files below build.input_root."
    )
    band: int | str = Field(1, description="Band of each file: its number from 1, or its name.")
    kind: Literal["continuous", "categorical", "canopy"] = Field(
        "continuous",
        description="continuous, categorical, or canopy (a quantity that is often zero).",
    )
    codes: tuple[int, ...] = Field((), description="All codes of a categorical feature.")
    nodata: float | Literal["nan"] | None = Field(
        None, description="Value that marks missing data; null means what each file declares."
    )
    resampling: Resampling | None = Field(
        None,
        description="Resampling method; null means nearest for categories and bilinear for others.",
    )
    static: bool = Field(
        False, description="Whether the feature has no date and is repeated along time."
    )
    index: Literal["ndvi", "ndwi", "cover", "classes"] | None = Field(
        None,
        description=(
            "Index that is computed from other bands or features: ndvi, ndwi, cover or classes."
        ),
    )
    red: int | str | None = Field(None, description="Red band or feature for the index.")
    green: int | str | None = Field(None, description="Green band or feature for the index.")
    nir: int | str | None = Field(None, description="Near-infrared band or feature for the index.")
    source: str | None = Field(None, description="Feature that index classes divides into classes.")
    breaks: tuple[float, ...] = Field(
        (), description="Ascending limits between the classes of index classes."
    )
    mask: str | None = Field(
        None, description="Glob pattern of files in which 0 marks pixels as missing."
    )
    extent: str | None = Field(
        None, description="GeoJSON file with the rectangle that .npy sources cover."
    )
    units: str | None = Field(None, description="Physical unit, as text.")

    @property
    def method(self) -> Resampling:
        """The resampling that applies."""
        return self.resampling or ("nearest" if self.kind == "categorical" else "bilinear")

    @property
    def inputs(self) -> dict[str, int | str]:
        """What an index is computed from: role -> band of `files` (int) or feature (str)."""
        if self.index is None:
            return {}
        return {role: getattr(self, role) for role in INDICES[self.index]}

    @model_validator(mode="after")
    def _makes_sense(self) -> RasterFeature:
        # A mean of two codes is a third one, and the most frequent of many quantities is chance.
        allowed = CATEGORY if self.kind == "categorical" else QUANTITY
        if self.method not in allowed:
            raise ValueError(
                f"feature {self.name!r}: a {self.kind} feature is resampled by"
                f" {' or '.join(allowed)}, not {self.method}"
            )
        # Counts by code and the classes of models need the whole list, which no window shows.
        if (self.kind == "categorical") != bool(self.codes):
            raise ValueError(
                f"feature {self.name!r}: codes belong to categorical features, and those need them"
            )
        if len(set(self.codes)) != len(self.codes) or any(
            abs(code) > EXACT_INTEGERS for code in self.codes
        ):
            raise ValueError(
                f"feature {self.name!r}: codes must be distinct and within ±{EXACT_INTEGERS},"
                " where float32 is exact"
            )
        if self.index is None and self.files is None:
            raise ValueError(f"feature {self.name!r} needs files, or an index of others")
        missing = [role for role, value in self.inputs.items() if value is None]
        if missing:
            raise ValueError(
                f"feature {self.name!r}: index {self.index} needs {' and '.join(missing)}"
            )
        if self.files is None and any(isinstance(value, int) for value in self.inputs.values()):
            raise ValueError(f"feature {self.name!r}: band numbers need files")
        if self.index == "classes":
            # `indices._classes` finds intervals by binary search, for which breaks must ascend.
            if (
                self.kind != "categorical"
                or len(self.breaks) + 1 != len(self.codes)
                or list(self.breaks) != sorted(set(self.breaks))
            ):
                raise ValueError(
                    f"feature {self.name!r}: n ascending breaks make n + 1 codes of a"
                    " categorical feature"
                )
        elif self.breaks or (self.index and self.kind == "categorical"):
            raise ValueError(
                f"feature {self.name!r}: breaks and categories belong to index classes"
            )
        return self


class Steps(Section):
    """Voxels along each axis."""

    time: int | None = Field(None, ge=1, description="Number of dates; null means automatic.")
    y: int | None = Field(None, ge=1, description="Number of rows; null means automatic.")
    x: int | None = Field(None, ge=1, description="Number of columns; null means automatic.")


class ChunkSteps(Steps):
    """Voxels and features of an inner chunk."""

    feature: Annotated[int | None, ADDED_LATER] = Field(
        None,
        ge=1,
        description="Number of features; null means all, 1 is best for reading single bands.",
    )


class RasterSettings(Section):
    """What a cube is made of (see config.yaml)."""

    grid: RasterGrid = Field(
        RasterGrid(),
        description=(
            "Grid onto which every source is warped; the grid of the first source if every"
            " key is null."
        ),
    )
    time: RasterTime = Field(RasterTime(), description="Source of the dates.")
    features: tuple[RasterFeature, ...] = Field(
        (),
        description=(
            "Features of the cube, in order; docs/format.md has examples, and "
            "ingest/rasters/settings.py describes the keys of each."
        ),
    )
    chunk: ChunkSteps = Field(
        ChunkSteps(time=5, y=32, x=32),
        description="Size of an inner chunk in voxels; an inner chunk is decoded as a whole.",
    )
    shard: Steps = Field(
        Steps(), description="Size of a stored chunk in voxels; a stored chunk is one file."
    )
    block: Steps = Field(
        Steps(), description="Size in voxels of the blocks that are assigned to splits as a whole."
    )
    guard: int = Field(
        0,
        ge=0,
        description=(
            "Number of inner chunks that are left out between training blocks and held-out blocks."
        ),
    )
    held_out_dates: int = Field(
        0,
        ge=0,
        description=(
            "Number of dates at the end that are used only for testing, rounded up to whole inner "
            "chunks."
        ),
    )
    empty_dates: Annotated[Literal["error", "keep"], NOT_CONTENT] = Field(
        "error", description="What to do with a date that has no valid value: error or keep."
    )

    @field_validator("chunk")
    @classmethod
    def _chunk_is_whole(cls, value: ChunkSteps) -> ChunkSteps:
        # Filled in here, because the recipe holds the sizes that were used.
        default = {"time": 5, "y": 32, "x": 32}
        return ChunkSteps(
            **{axis: getattr(value, axis) or size for axis, size in default.items()},
            feature=value.feature,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> RasterSettings:
        # An inner chunk is compressed, checked and assigned to a split as a whole.
        for name in ("shard", "block"):
            for axis in ("time", "y", "x"):
                size, inner = getattr(getattr(self, name), axis), getattr(self.chunk, axis)
                if size is not None and size % inner:
                    raise ValueError(
                        f"{name}.{axis} must be a multiple of chunk.{axis} ({inner}), not {size}"
                    )
        # Only features above count as inputs, so there are no cycles and one pass computes all.
        above: set[str] = set()
        for feature in self.features:
            if feature.name in above:
                raise ValueError(f"two features are named {feature.name!r}")
            unknown = [
                value
                for value in feature.inputs.values()
                if isinstance(value, str) and value not in above
            ]
            if unknown:
                raise ValueError(
                    f"feature {feature.name!r} is made of {unknown[0]!r}, which no feature"
                    " above it is named"
                )
            above.add(feature.name)
        return self
