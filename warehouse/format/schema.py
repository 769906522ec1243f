"""The recipe of a build and the arrays it writes: settings, array layout, dimension names, codecs.

A layout is a pure function of (settings, sample count): two builders with the same recipe write the
same chunks, for any number of workers. Nothing here touches a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from warehouse.settings import MASK_PADDING, BuildSettings

__all__ = [
    "CLIPPED",
    "CROWD",
    "DIFFICULT",
    "FORMAT_VERSION",
    "GEOMETRY",
    "IGNORED",
    "TRUNCATED",
    "ArraySpec",
    "Codec",
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
CHUNK_BYTES = 128 << 20
MIN_SHARD_SAMPLES = 64


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
    samples: int, settings: BuildSettings, *, target: bool = False, mask: bool = False
) -> list[ArraySpec]:
    """The arrays of one split of pictures, all with the same stored-chunk length. Sharded by
    sample: `image` and `mask`.

    target: with the class of each picture; mask: with the class of each pixel.
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
    if target:
        small.append(
            ("target", (), "int16", ("sample",), "class of the picture, index into class_names")
        )
    if mask:
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
