"""The arrays that a build writes: shapes, dimension names, stored chunks and codecs.

The arrays are a pure function of (settings, number of samples): two builders with the same recipe
write the same chunks, for any number of workers. Nothing here touches a file. What was given up for
that: the size of a stored chunk cannot adapt to the free memory of the machine that builds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    "Compressor",
    "picture_arrays",
    "shard_samples",
]

FORMAT_VERSION = 1
CROWD, DIFFICULT, TRUNCATED, CLIPPED = 1, 2, 4, 8
IGNORED = CROWD | DIFFICULT
"""Boxes with any of these flags are left out of the loss and of AP."""

GEOMETRY = ("scale_x", "scale_y", "pad_x", "pad_y", "raw_width", "raw_height")
"""The columns of `letterbox`: canvas = source * scale + pad, in pixels.

`raw_width` and `raw_height` are the size of the source after its EXIF orientation was applied.
"""

CHUNK_BYTES = 128 << 20
MIN_SHARD_SAMPLES = 64

Compressor = Literal["lz4", "lz4hc", "none"]
"""What `build.compressor` may be."""

_MASK_TEXT = f"class of each pixel; {MASK_PADDING} where the canvas shows no picture"


@dataclass(frozen=True, slots=True)
class Codec:
    """The codecs of an inner chunk: `bytes` (little endian), Blosc if wanted, and `crc32c`.

    Attributes
    ----------
    cname
        Compressor inside Blosc; None for no Blosc at all.
    clevel
        Its level, 0 to 9.
    shuffle
        Whether bytes are shuffled first; 2 shuffles bits.
    typesize
        Bytes of the items that are shuffled.
    blocksize
        Bytes that Blosc compresses at once; 0 lets Blosc choose.
    """

    cname: Literal["lz4", "lz4hc", "zstd"] | None = "lz4"
    clevel: int = 9
    shuffle: bool | Literal[2] = False
    typesize: int = 1
    # A whole image in one block decoded 3% faster than in blocks of the default size.
    blocksize: int = 0


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One Zarr array as its readers see it: [sample, ...].

    A sharded sample is one inner chunk, or `parts` of them side by side along its last axis; the
    last part may reach beyond it.

    Attributes
    ----------
    shape, dtype, dims
        Of the whole array; `dims` are the names of its dimensions.
    chunk
        Shape of a stored chunk, which is one file.
    inner
        Shape of an inner chunk; None for an array that is not sharded.
    attrs
        Attributes of the Zarr array.
    grid
        Stored chunks along each dimension of the array on disk, where that is cut along other
        dimensions than `sample`, as cubes are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    chunk: tuple[int, ...]
    inner: tuple[int, ...] | None
    codec: Codec
    attrs: Mapping[str, object] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None

    @property
    def parts(self) -> int:
        """Number of inner chunks that a sample is cut into."""
        return 1 if self.inner is None else -(-self.shape[-1] // self.inner[-1])

    @property
    def row_bytes(self) -> int:
        """Uncompressed bytes of one sample."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize


def shard_samples(samples: int, sample_bytes: int, wanted: int | None = None) -> int:
    """Return the number of samples of a stored chunk.

    That is `wanted` if given; or else as many as fit into 128 MiB, at most an eighth of the split
    (rounded up) and at least 64.
    """
    if wanted is not None:
        return wanted

    # A sample may have no bytes at all, with an axis of length 0.
    fitting = CHUNK_BYTES // max(1, sample_bytes)
    # A split in a single stored chunk could neither be built by several workers nor be shuffled by
    # chunks.
    eighth = -(-samples // 8)

    return max(MIN_SHARD_SAMPLES, min(fitting, eighth))


def image_codec(compressor: Compressor, dtype: str, row_bytes: int) -> Codec:
    """Return the codec of images or masks of `row_bytes` bytes each."""
    itemsize = np.dtype(dtype).itemsize
    cname = None if compressor == "none" else compressor
    level = 5 if cname == "lz4hc" else 9
    # Shuffling groups the bytes of items by their position, which changes nothing for 1-byte items.
    shuffle = itemsize > 1

    return Codec(cname, level, shuffle, itemsize, row_bytes)


@dataclass(frozen=True, slots=True)
class _SmallPictureArray:
    """An array with a few bytes a picture, kept in one plain file a stored chunk."""

    name: str
    row: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    text: str

    def spec(self, samples: int, size: int, compressor: str) -> ArraySpec:
        itemsize = np.dtype(self.dtype).itemsize
        cname: Literal["lz4"] | None = None if compressor == "none" else "lz4"

        return ArraySpec(
            self.name,
            (samples, *self.row),
            self.dtype,
            ("sample", *self.dims),
            (size, *self.row),
            # Not sharded: the index of a shard takes 16 bytes a sample, and readers decode the
            # whole file once and keep it.
            None,
            Codec(cname, 9, itemsize > 1, itemsize),
            {"long_name": self.text},
        )


def picture_arrays(
    samples: int, settings: BuildSettings, *, target: bool = False, mask: bool = False
) -> list[ArraySpec]:
    """Return the arrays of one split of images, all with stored chunks of the same length.

    `image` and `mask` are sharded by sample.

    Parameters
    ----------
    samples
        Images of the split.
    target
        Whether there is the class of each image.
    mask
        Whether there is the class of each pixel.
    """
    height, width = settings.target_size
    image_bytes = 3 * height * width * np.dtype(settings.dtype).itemsize
    # The image decides for all arrays: the rows of a sample then lie at the same position of the
    # same stored chunk in each of them.
    size = shard_samples(samples, image_bytes, settings.shard_samples)

    image_attrs: dict[str, object] = {"long_name": "picture, RGB, in [0, 1]"}
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
    if mask:
        specs.append(
            ArraySpec(
                "mask",
                (samples, height, width),
                "uint8",
                ("sample", "y", "x"),
                (size, height, width),
                (1, height, width),
                image_codec(settings.compressor, "uint8", height * width),
                {"long_name": _MASK_TEXT},
            )
        )

    small = _small_arrays(settings.max_boxes, target=target)
    return [*specs, *(each.spec(samples, size, settings.compressor) for each in small)]


def _small_arrays(box_slots: int, *, target: bool) -> list[_SmallPictureArray]:
    small = [
        _SmallPictureArray(
            "box",
            (box_slots, 4),
            "float32",
            ("slot", "corner"),
            "xyxy, normalised to the canvas; padded slots 0",
        ),
        _SmallPictureArray(
            "box_mask", (box_slots,), "bool", ("slot",), "true where a slot holds a box"
        ),
        _SmallPictureArray(
            "box_flags",
            (box_slots,),
            "uint8",
            ("slot",),
            "bits: 1 crowd, 2 difficult, 4 truncated, 8 clipped",
        ),
        _SmallPictureArray(
            "label",
            (box_slots,),
            "int16",
            ("slot",),
            "index into class_names, -1 in padded slots",
        ),
        _SmallPictureArray(
            "letterbox", (len(GEOMETRY),), "float32", ("geometry",), ", ".join(GEOMETRY)
        ),
    ]
    if target:
        small.append(
            _SmallPictureArray(
                "target", (), "int16", (), "class of the picture, index into class_names"
            )
        )
    return small
