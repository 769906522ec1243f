"""The `raster` section: which grid, which dates, which features, and how the cube is cut.

A feature is one column of the cube. It is read from `files` (a band of each) or computed from
others (`index`). Everything here but `empty_dates` decides what is written, and so the version's
name.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from warehouse.settings import Section

__all__ = ["INDICES", "RasterFeature", "RasterSettings"]

INDICES: dict[str, tuple[str, ...]] = {
    "ndvi": ("red", "nir"),
    "ndwi": ("green", "nir"),
    "cover": ("red", "nir"),
    "classes": ("source",),
}
"""index -> the inputs it needs."""
EXACT_INTEGERS = 1 << 24
QUANTITY, CATEGORY = ("bilinear", "average", "nearest"), ("nearest", "mode")


class RasterGrid(Section):
    """The grid of the cube: one file's, or named.

    All null: that of the first source, when all share a CRS.
    """

    like: str | None = Field(None, description="a raster below input_root whose grid is taken")
    crs: str | None = Field(None, description="such as EPSG:32633")
    resolution: float | None = Field(None, gt=0, description="pixel edge in units of the CRS")
    bounds: tuple[float, float, float, float] | None = Field(
        None, description="left, bottom, right, top in units of the CRS"
    )
    geojson: str | None = Field(
        None,
        description="file with a rectangle and its CRS; without resolution, cut as the first .npy is",
    )

    @model_validator(mode="after")
    def _one_way(self) -> RasterGrid:
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
        description="regular expression with a group `date`, searched in each file's name",
    )
    format: str = Field("%Y%m%d", description="how `date` is written, as strptime takes it")
    file: str | None = Field(None, description="JSON list of ISO dates for .npy sources")

    @field_validator("pattern")
    @classmethod
    def _has_a_date(cls, value: str) -> str:
        try:
            groups = re.compile(value).groupindex
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if "date" not in groups:
            raise ValueError("the pattern needs a group (?P<date>...)")
        return value


class RasterFeature(Section):
    """One feature.

    Read from `files`, or an `index` of bands of `files` (numbers) or of features above it (names).
    """

    name: str = Field(min_length=1, max_length=64)
    files: str | None = None
    band: int | str = 1
    kind: Literal["continuous", "categorical", "canopy"] = "continuous"
    codes: tuple[int, ...] = ()
    nodata: float | Literal["nan"] | None = None
    resampling: Literal["nearest", "mode", "bilinear", "average"] | None = None
    static: bool = False
    index: Literal["ndvi", "ndwi", "cover", "classes"] | None = None
    red: int | str | None = None
    green: int | str | None = None
    nir: int | str | None = None
    source: str | None = None
    breaks: tuple[float, ...] = ()
    mask: str | None = None
    extent: str | None = None
    units: str | None = None

    @property
    def method(self) -> str:
        """The resampling that applies."""
        return self.resampling or ("nearest" if self.kind == "categorical" else "bilinear")

    @property
    def inputs(self) -> dict[str, int | str]:
        """role -> band of `files` (int) or feature (str), of an index."""
        return {role: getattr(self, role) for role in INDICES[self.index]} if self.index else {}

    @model_validator(mode="after")
    def _makes_sense(self) -> RasterFeature:
        allowed = CATEGORY if self.kind == "categorical" else QUANTITY
        if self.method not in allowed:
            raise ValueError(
                f"feature {self.name!r}: a {self.kind} feature is resampled by {' or '.join(allowed)}, not {self.method}"
            )
        if (self.kind == "categorical") != bool(self.codes):
            raise ValueError(
                f"feature {self.name!r}: codes belong to categorical features, and those need them"
            )
        if len(set(self.codes)) != len(self.codes) or any(
            abs(code) > EXACT_INTEGERS for code in self.codes
        ):
            raise ValueError(
                f"feature {self.name!r}: codes must be distinct and within ±{EXACT_INTEGERS}, where float32 is exact"
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
            if (
                self.kind != "categorical"
                or len(self.breaks) + 1 != len(self.codes)
                or list(self.breaks) != sorted(set(self.breaks))
            ):
                raise ValueError(
                    f"feature {self.name!r}: n ascending breaks make n + 1 codes of a categorical feature"
                )
        elif self.breaks or (self.index and self.kind == "categorical"):
            raise ValueError(
                f"feature {self.name!r}: breaks and categories belong to index classes"
            )
        return self


class Steps(Section):
    """Voxels along each axis; null: as the table of settings says."""

    time: int | None = Field(None, ge=1)
    y: int | None = Field(None, ge=1)
    x: int | None = Field(None, ge=1)


class ChunkSteps(Steps):
    """An inner chunk. feature: features in it; null: all."""

    feature: int | None = Field(None, ge=1)


class RasterSettings(Section):
    """What a cube is made of (see config.yaml)."""

    grid: RasterGrid = RasterGrid()
    time: RasterTime = RasterTime()
    features: tuple[RasterFeature, ...] = ()
    chunk: ChunkSteps = ChunkSteps(time=5, y=32, x=32)
    shard: Steps = Steps()
    block: Steps = Steps()
    guard: int = Field(0, ge=0, description="inner chunks left out around val and test")
    held_out_dates: int = Field(
        0, ge=0, description="last dates that are test only, in whole inner chunks"
    )
    empty_dates: Literal["error", "keep"] = Field(
        "error", description="a date without any valid value: refuse or keep"
    )

    @field_validator("chunk")
    @classmethod
    def _chunk_is_whole(cls, value: ChunkSteps) -> ChunkSteps:
        default = {"time": 5, "y": 32, "x": 32}
        return ChunkSteps(
            **{axis: getattr(value, axis) or size for axis, size in default.items()},
            feature=value.feature,
        )

    @model_validator(mode="after")
    def _fits_together(self) -> RasterSettings:
        for name in ("shard", "block"):
            for axis in ("time", "y", "x"):
                size, inner = getattr(getattr(self, name), axis), getattr(self.chunk, axis)
                if size is not None and size % inner:
                    raise ValueError(
                        f"{name}.{axis} must be a multiple of chunk.{axis} ({inner}), not {size}"
                    )
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
                    f"feature {feature.name!r} is made of {unknown[0]!r}, which no feature above it is named"
                )
            above.add(feature.name)
        return self

    def content(self) -> dict[str, Any]:
        """What decides the cube's content: part of the version key.

        Without `chunk.feature` the name is what it was before that key.
        """
        content = {
            key: value
            for key, value in self.model_dump(mode="json").items()
            if key != "empty_dates"
        }
        return (
            content
            if self.chunk.feature is not None
            else content | {"chunk": self.chunk.model_dump(exclude={"feature"})}
        )
