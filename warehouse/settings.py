"""The settings sections of what the warehouse itself does: build, inspect, verify and export.

This module imports no heavy library, so that a command answers `--help` quickly.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from warehouse.section import NOT_CONTENT, PICTURES_ONLY, RECORDED_APART, Section

__all__ = [
    "MASK_PADDING",
    "SPLIT_NAMES",
    "BuildSettings",
    "ExportSettings",
    "InspectSettings",
    "VerifySettings",
]


MASK_PADDING = 255
"""In `mask`, where the canvas shows no picture."""


SPLIT_NAMES = ("train", "val", "test")


class BuildSettings(Section):
    """What `build_zarr` bakes, from where, into what."""

    input_root: Annotated[str | None, RECORDED_APART] = Field(
        None, description="Folder with the images and annotations, or with the rasters. Required."
    )
    format: Annotated[str, RECORDED_APART] = Field(
        "auto",
        description=(
            "Annotation format: voc, coco, yolo, masks, classes (a folder per class) or folder "
            "(no boxes); auto detects it. raster builds a cube instead."
        ),
    )
    output_root: Annotated[str, NOT_CONTENT] = Field(
        "artifacts/tensor_warehouse", description="Warehouse in which the version is published."
    )
    target_size: Annotated[tuple[int, int], PICTURES_ONLY] = Field(
        (384, 384), description="Height and width of the stored images in pixels."
    )
    resize_mode: Annotated[Literal["letterbox", "stretch"], PICTURES_ONLY] = Field(
        "letterbox",
        description=(
            "letterbox keeps the aspect ratio and pads the image; stretch changes the aspect "
            "ratio instead."
        ),
    )
    pad_value: Annotated[int, PICTURES_ONLY] = Field(
        114, ge=0, le=255, description="Grey value of the padding, from 0 to 255."
    )
    max_boxes: Annotated[int, PICTURES_ONLY] = Field(
        16,
        ge=1,
        le=10_000,
        description=(
            "Largest number of boxes stored per image; see too_many_boxes for images with more."
        ),
    )
    too_many_boxes: Annotated[Literal["error", "truncate"], PICTURES_ONLY] = Field(
        "error",
        description=(
            "What to do with an image that has more than max_boxes boxes: error, or truncate to "
            "keep the largest."
        ),
    )
    dtype: Annotated[Literal["uint8", "float16", "float32"], PICTURES_ONLY] = Field(
        "uint8",
        description=(
            "Type of the stored pixels; floats are in [0, 1] and take 2 or 4 times the space."
        ),
    )
    shard_samples: Annotated[int | None, PICTURES_ONLY] = Field(
        None,
        ge=1,
        le=1 << 20,
        description=(
            "Samples per stored chunk; null means as many as fit into 128 MiB, but at most an "
            "eighth of the split and at least 64."
        ),
    )
    compressor: Literal["lz4", "lz4hc", "none"] = Field(
        "lz4",
        description=(
            "Compression: lz4, lz4hc (files a fifth smaller, builds 13 times slower) or none."
        ),
    )
    skip_empty: Annotated[bool, PICTURES_ONLY] = Field(
        False, description="Leave out images without boxes."
    )
    missing_is_empty: Annotated[bool, PICTURES_ONLY] = Field(
        False,
        description="Treat an image without an annotation as background instead of rejecting it.",
    )
    classes: Annotated[list[str] | None, PICTURES_ONLY] = Field(
        None,
        description=(
            "Names of the classes, in order; boxes of other classes are rejected. null means all "
            "classes that are found."
        ),
    )
    splits: dict[str, float] = Field(
        {"train": 0.8, "val": 0.1, "test": 0.1},
        description=(
            "Share of the samples in each split; a group stays in one split. Splits given as "
            "folders are used as they are."
        ),
    )
    seed: int = Field(
        0, ge=0, description="Seed for the split and for the sample order within each split."
    )
    group_pattern: Annotated[str | None, PICTURES_ONLY] = Field(
        r"^(.+)\.rf\.[0-9a-f]+\.[A-Za-z]+$",
        description=(
            "Regular expression; files whose names give the same text for its first group "
            "stay in one split. null turns grouping off."
        ),
    )
    max_pixels: Annotated[int, PICTURES_ONLY] = Field(
        178_956_970,
        ge=1,
        description=(
            "Largest number of pixels in an image; a larger image is rejected before it is decoded."
        ),
    )
    mask_values: Annotated[dict[int, int], RECORDED_APART] = Field(
        {0: 0, 255: 1},
        description="Class for each pixel value of the mask files; other values are rejected.",
    )
    if_exists: Annotated[Literal["skip", "clear"], NOT_CONTENT] = Field(
        "skip",
        description=(
            "What to do if the version exists: skip the build, or clear the version and build it "
            "again."
        ),
    )
    max_invalid: Annotated[int, NOT_CONTENT] = Field(
        0,
        ge=0,
        description="Largest number of images that may be unreadable or have only invalid boxes.",
    )
    max_missing: Annotated[int, NOT_CONTENT] = Field(
        0,
        ge=0,
        description=(
            "Largest number of images without an annotation plus annotations without an image."
        ),
    )
    max_empty_ratio: Annotated[float, NOT_CONTENT] = Field(
        0.05, ge=0, le=1, description="Largest share of the kept images that may have no boxes."
    )
    workers: Annotated[int | None, NOT_CONTENT] = Field(
        None,
        ge=0,
        le=1024,
        description=(
            "Number of local workers; null means one per core, 0 means none. Up to four workers "
            "of an image build are threads; otherwise they are processes."
        ),
    )
    cluster: Annotated[str | None, NOT_CONTENT] = Field(
        None,
        description=(
            "Address of a running Dask scheduler, such as tcp://head:8786; null means local "
            "workers."
        ),
    )
    trace: Annotated[bool | str, NOT_CONTENT] = Field(
        True,
        description=(
            "Record the seconds per step and chunk in trace.jsonl, or in another file if a"
            " path is given."
        ),
    )
    rehash: Annotated[bool, NOT_CONTENT] = Field(
        False,
        description=(
            "Read every source file again instead of trusting its size, modification time"
            " and inode."
        ),
    )
    dry_run: Annotated[bool, NOT_CONTENT] = Field(
        False,
        description="Report what would be read, rejected and written, without writing anything.",
    )

    @field_validator("trace", mode="before")
    @classmethod
    def _trace_is_a_switch_or_a_path(cls, value: object) -> object:
        # Flags and environment variables are text, which `bool | str` would take for a path.
        word = str(value).lower()
        if word in {"1", "true", "yes", "on"}:
            return True
        return False if word in {"0", "false", "no", "off"} else value

    @field_validator("target_size")
    @classmethod
    def _size_is_sane(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(8 <= side <= 16_384 for side in value):
            raise ValueError(
                f"both sides (H, W) must be between 8 and 16384 pixels, not {list(value)}"
            )
        return value

    @field_validator("splits")
    @classmethod
    def _shares_add_up(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(SPLIT_NAMES))
        if unknown:
            raise ValueError(
                f"unknown split {unknown[0]!r}; known ones are {', '.join(SPLIT_NAMES)}"
            )
        if any(share < 0 for share in value.values()) or not math.isclose(
            sum(value.values()), 1.0, abs_tol=1e-6
        ):
            raise ValueError(f"shares must be non-negative and add up to 1, not {value}")
        return value

    @field_validator("mask_values")
    @classmethod
    def _mask_values_fit(cls, value: dict[int, int]) -> dict[int, int]:
        if not value or not all(
            0 <= found <= 255 and 0 <= index < MASK_PADDING for found, index in value.items()
        ):
            raise ValueError(
                f"maps values 0..255 of the mask files to classes 0..{MASK_PADDING - 1},"
                f" not {value}"
            )
        return value

    @field_validator("classes")
    @classmethod
    def _classes_are_distinct(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and (not value or len(set(value)) != len(value)):
            raise ValueError("classes must be a list of distinct names")
        return value

    @field_validator("group_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value


class InspectSettings(Section):
    """What `inspect_zarr` shows."""

    path: str | None = Field(
        None,
        description=(
            "Warehouse root, version folder or manifest.json; null means the newest version "
            "under build.output_root."
        ),
    )
    split: str | None = Field(
        None, description="Split shown on the contact sheet; null means the first one."
    )
    output: str | None = Field(
        None,
        description=(
            "PNG file of the contact sheet; null means artifacts/inspect/<version>_<split>.png."
        ),
    )
    pictures: int = Field(
        24,
        ge=1,
        le=400,
        description="Number of images on the contact sheet, spread evenly over the split.",
    )


class VerifySettings(Section):
    """What `verify_zarr` checks."""

    path: str | None = Field(
        None,
        description=(
            "Warehouse root, version folder or manifest.json; null means the newest version "
            "under build.output_root."
        ),
    )
    level: Literal["full", "quick"] = Field(
        "full",
        description=(
            "full hashes every file and decodes every sample; quick compares sizes and indices."
        ),
    )


class ExportSettings(Section):
    """What `export_summary` writes."""

    path: str | None = Field(
        None,
        description=(
            "Warehouse root, version folder or manifest.json; null means the newest version "
            "under build.output_root."
        ),
    )
    output: str = Field(
        "artifacts/export",
        description="Folder for the Parquet tables of summaries, samples, chunks and timings.",
    )
