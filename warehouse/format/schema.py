"""The recipe of a build and the arrays it writes: settings, array layout, dimension names, codecs.

A layout is a pure function of (settings, sample count): two builders with the same recipe write the
same chunks, for any number of workers. Nothing here touches a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = [
    "BOXLESS",
    "CLIPPED",
    "CROWD",
    "DIFFICULT",
    "FORMAT_VERSION",
    "GEOMETRY",
    "IGNORED",
    "MASK_PADDING",
    "SPLIT_NAMES",
    "TRUNCATED",
    "ArraySpec",
    "BuildSettings",
    "Codec",
    "Section",
    "picture_arrays",
    "shard_samples",
]

FORMAT_VERSION = 1
CROWD, DIFFICULT, TRUNCATED, CLIPPED = 1, 2, 4, 8
IGNORED = CROWD | DIFFICULT
"""Boxes with any of these flags are left out of loss and AP."""
GEOMETRY = ("scale_x", "scale_y", "pad_x", "pad_y", "raw_width", "raw_height")
"""The columns of `letterbox`: canvas = source * scale + pad, in pixels.

Raw size after EXIF orientation.
"""
MASK_PADDING = 255
"""In `mask`, where the canvas shows no picture."""
BOXLESS = frozenset({"folder", "classes", "masks"})
"""Formats without boxes: nothing can be missing or empty."""
CHUNK_BYTES = 128 << 20
MIN_SHARD_SAMPLES = 64
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
    trace: bool = True
    rehash: bool = False
    dry_run: bool = False

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


@dataclass(frozen=True, slots=True)
class Codec:
    """One inner chunk's codecs: `bytes` (little endian), optional Blosc, `crc32c`.

    blocksize 0 lets Blosc choose; a whole picture in one block decoded 3% faster than the default
    (docs/log.md). shuffle: none, by bytes, or (2) by bits.
    """

    cname: Literal["lz4", "lz4hc", "zstd"] | None = "lz4"
    clevel: int = 9
    shuffle: bool | Literal[2] = False
    typesize: int = 1
    blocksize: int = 0


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One Zarr array: `chunk` is the stored chunk's shape; `inner` the inner chunk's, or None for a
    plain, unsharded array.

    grid: stored chunks along each dimension of the array on disk, where that is cut along others
    than `sample` (cubes). A sharded sample is one inner chunk, or `parts` of them side by side
    along its last axis; the last part may reach beyond it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    chunk: tuple[int, ...]
    inner: tuple[int, ...] | None
    codec: Codec
    attrs: dict[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None

    @property
    def parts(self) -> int:
        """Inner chunks a sample is cut into."""
        return 1 if self.inner is None else -(-self.shape[-1] // self.inner[-1])

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one sample."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def shard_samples(samples: int, sample_bytes: int, wanted: int | None = None) -> int:
    """Samples of a stored chunk.

    128 MiB of them, at most ceil(samples / 8) and at least 64, unless `wanted` says otherwise.
    """
    if wanted is not None:
        return wanted
    return max(MIN_SHARD_SAMPLES, min(CHUNK_BYTES // max(1, sample_bytes), -(-samples // 8)))


def image_codec(compressor: str, dtype: str, row_bytes: int) -> Codec:
    """uint8 pictures are not shuffled (shuffling 1-byte items does nothing).

    Floats are, by their item size.
    """
    itemsize = np.dtype(dtype).itemsize
    cname: Any = None if compressor == "none" else compressor
    return Codec(cname, 5 if cname == "lz4hc" else 9, itemsize > 1, itemsize, row_bytes)


def picture_arrays(
    samples: int, settings: BuildSettings, source_format: str | None = None
) -> list[ArraySpec]:
    """The arrays of one split of pictures, all with the same stored-chunk length. Sharded by
    sample: `image` and `mask`.

    source_format: `classes` adds `target`, `masks` adds `mask`.
    """
    height, width = settings.target_size
    slots = settings.max_boxes
    image_bytes = 3 * height * width * np.dtype(settings.dtype).itemsize
    size = shard_samples(samples, image_bytes, settings.shard_samples)
    image_attrs: dict[str, Any] = {"long_name": "picture, RGB, in [0, 1]"}
    if settings.dtype == "uint8":
        image_attrs["scale_factor"] = 1 / 255
    specs = [
        ArraySpec(
            "image",
            (samples, 3, height, width),
            settings.dtype,
            ("sample", "channel", "y", "x"),
            (size, 3, height, width),
            (1, 3, height, width),
            image_codec(settings.compressor, settings.dtype, image_bytes),
            image_attrs,
        ),
    ]
    small: list[tuple[str, tuple[int, ...], str, tuple[str, ...], str]] = [
        (
            "box",
            (slots, 4),
            "float32",
            ("sample", "slot", "corner"),
            "xyxy, normalised to the canvas; padded slots 0",
        ),
        ("box_mask", (slots,), "bool", ("sample", "slot"), "true where a slot holds a box"),
        (
            "box_flags",
            (slots,),
            "uint8",
            ("sample", "slot"),
            "bits: 1 crowd, 2 difficult, 4 truncated, 8 clipped",
        ),
        (
            "label",
            (slots,),
            "int16",
            ("sample", "slot"),
            "index into class_names, -1 in padded slots",
        ),
        ("letterbox", (len(GEOMETRY),), "float32", ("sample", "geometry"), ", ".join(GEOMETRY)),
    ]
    if source_format == "classes":
        small.append(
            ("target", (), "int16", ("sample",), "class of the picture, index into class_names")
        )
    if source_format == "masks":
        codec = image_codec(settings.compressor, "uint8", height * width)
        attrs = {
            "long_name": f"class of each pixel; {MASK_PADDING} where the canvas shows no picture"
        }
        shape = (height, width)
        specs.append(
            ArraySpec(
                "mask",
                (samples, *shape),
                "uint8",
                ("sample", "y", "x"),
                (size, *shape),
                (1, *shape),
                codec,
                attrs,
            )
        )
    for name, row, dtype, dims, text in small:
        itemsize = np.dtype(dtype).itemsize
        codec = Codec(None if settings.compressor == "none" else "lz4", 9, itemsize > 1, itemsize)
        specs.append(
            ArraySpec(
                name, (samples, *row), dtype, dims, (size, *row), None, codec, {"long_name": text}
            )
        )
    return specs
