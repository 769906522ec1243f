"""The settings sections of what the warehouse itself does: build, inspect, verify and export.

Every section of `config.yaml` is a frozen model that derives from `Section`. This module imports
nothing of the package, so that a command can offer its `--help` without loading zarr or dask.
"""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = [
    "MASK_PADDING",
    "SPLIT_NAMES",
    "BuildSettings",
    "ExportSettings",
    "InspectSettings",
    "Section",
    "VerifySettings",
]


MASK_PADDING = 255
"""In `mask`, where the canvas shows no picture."""


SPLIT_NAMES = ("train", "val", "test")


class Section(BaseModel):
    """One section of `config.yaml`: frozen, unknown keys refused, checked on construction."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class BuildSettings(Section):
    """What `build_zarr` bakes, from where, into what."""

    input_root: str | None = None
    format: Literal["auto", "voc", "coco", "yolo", "folder", "classes", "masks", "raster"] = "auto"
    output_root: str = "artifacts/tensor_warehouse"
    target_size: tuple[int, int] = (384, 384)
    resize_mode: Literal["letterbox", "stretch"] = "letterbox"
    pad_value: int = Field(114, ge=0, le=255)
    max_boxes: int = Field(16, ge=1, le=10_000)
    too_many_boxes: Literal["error", "truncate"] = "error"
    dtype: Literal["uint8", "float16", "float32"] = "uint8"
    shard_samples: int | None = Field(None, ge=1, le=1 << 20)
    compressor: Literal["lz4", "lz4hc", "none"] = "lz4"
    skip_empty: bool = False
    missing_is_empty: bool = False
    classes: list[str] | None = None
    splits: dict[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
    seed: int = Field(0, ge=0)
    group_pattern: str | None = r"^(.+)\.rf\.[0-9a-f]+\.[A-Za-z]+$"
    max_pixels: int = Field(178_956_970, ge=1)
    mask_values: dict[int, int] = {0: 0, 255: 1}
    if_exists: Literal["skip", "clear"] = "skip"
    max_invalid: int = Field(0, ge=0)
    max_missing: int = Field(0, ge=0)
    max_empty_ratio: float = Field(0.05, ge=0, le=1)
    workers: int | None = Field(None, ge=0, le=1024)
    cluster: str | None = None
    trace: bool | str = True
    rehash: bool = False
    dry_run: bool = False

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
                f"maps values 0..255 of the mask files to classes 0..{MASK_PADDING - 1}, not {value}"
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

    def content(self) -> dict[str, Any]:
        """The settings that decide what is written: part of the version key.

        Thresholds, paths and workers are not.
        """
        return {
            key: value for key, value in self.model_dump(mode="json").items() if key in CONTENT_KEYS
        }


CONTENT_KEYS = frozenset(
    {
        "target_size",
        "resize_mode",
        "pad_value",
        "max_boxes",
        "too_many_boxes",
        "dtype",
        "shard_samples",
        "compressor",
        "skip_empty",
        "missing_is_empty",
        "classes",
        "splits",
        "seed",
        "group_pattern",
        "max_pixels",
    }
)


class InspectSettings(Section):
    """What `inspect_zarr` shows."""

    path: str | None = Field(
        None, description="warehouse root, version folder or manifest.json; null: build.output_root"
    )
    split: str | None = Field(None, description="split of the contact sheet; null: the first")
    output: str | None = Field(
        None, description="PNG of the contact sheet; null: artifacts/inspect/<version>_<split>.png"
    )
    pictures: int = Field(
        24, ge=1, le=400, description="pictures on the contact sheet, spread evenly over the split"
    )


class VerifySettings(Section):
    """What `verify_zarr` checks."""

    path: str | None = Field(
        None, description="warehouse root, version folder or manifest.json; null: build.output_root"
    )
    level: Literal["full", "quick"] = Field(
        "full",
        description="full hashes every file and decodes every sample; quick compares sizes and indices",
    )


class ExportSettings(Section):
    """What `export_summary` writes."""

    path: str | None = Field(
        None, description="warehouse root, version folder or manifest.json; null: build.output_root"
    )
    output: str = Field(
        "artifacts/export", description="folder for summary, samples, chunks and trace as Parquet"
    )
