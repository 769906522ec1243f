"""Lossless packings of a categorical feature, to compare with what a VQ-VAE keeps of it.

Classes are numbered from 0 in the order of their codes. What is missing is class 0 and told apart
by the bits of `valid`, which are charged to every packing. A stream holds all held-out blocks, an
image as many rows as Pillow will open; only zstd's stored chunks can be read one by one.
"""

from __future__ import annotations

import io
import lzma
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from vqvae.rate.codecs.jpeg2000 import missing_openjpeg, row_parts
from vqvae.rate.codecs.streams import mask_bytes
from vqvae.rate.distortion import packed_bytes
from vqvae.rate.mosaic import Mosaic
from vqvae.rate.points import Packing, PackingResult
from warehouse.format.schema import ArraySpec, Codec
from warehouse.layouts.features import Feature

__all__ = ["PACKINGS", "class_numbers", "lossless_categories", "unpack_bits"]

Numbers = NDArray[np.uint8]

Encode = Callable[[Numbers, int], list[bytes]]
"""Numbers [time, rows, columns] of so many classes to streams."""

Decode = Callable[[Sequence[bytes], int, int], Numbers]
"""Streams of so many classes to so many numbers."""


def class_numbers(values: NDArray[Any], valid: NDArray[np.bool_], codes: Sequence[int]) -> Numbers:
    """Number classes by their position among the sorted codes.

    Parameters
    ----------
    values, valid
        Codes as floats, and where they are known.
    codes
        The feature's codes.

    Returns
    -------
    numpy.ndarray
        uint8, 0 where missing.
    """
    order = np.sort(np.array(codes, np.float32))
    # Missing values become a class that exists, so that they cost no bit of their own.
    return np.searchsorted(order, np.where(valid, values, order[0])).astype(np.uint8)


def pack_bits(numbers: Numbers, classes: int) -> list[bytes]:
    """Compress the fewest whole bits a number, plane by plane, with Blosc-zstd."""
    flat, width = numbers.reshape(-1), _bits(classes)
    # By planes, since zstd's Huffman stage works on bytes and packed numbers of 2 bits are four a
    # byte.
    planes = np.stack([np.packbits(flat >> plane & 1) for plane in range(width)])
    return [bytes(blosc.compress(planes, b"zstd", 9, 0, 0, 1))]


def unpack_bits(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    """Undo `pack_bits`: uint8 [count]."""
    buffer = np.frombuffer(blosc.decompress(streams[0]), np.uint8)
    bits = np.unpackbits(buffer.reshape(_bits(classes), -1), axis=1, count=count)
    weights = np.arange(len(bits), dtype=np.uint8)[:, None]
    out: Numbers = np.bitwise_or.reduce(bits << weights, axis=0)
    return out


def _bits(classes: int) -> int:
    return max(1, (classes - 1).bit_length())


def image_encoder(kind: str, **options: bool) -> Encode:
    """Return an encoder of planes [time, rows, columns] below each other as one grey image.

    Several images where one would be too large. kind, options: as Pillow takes
    them.
    """

    def encode(numbers: Numbers, classes: int) -> list[bytes]:
        from PIL import Image

        streams = []
        # Several images where one would be larger than Pillow opens (tests/vqvae/test_rate.py).
        for part in row_parts(numbers.reshape(-1, numbers.shape[-1]), axis=0):
            buffer = io.BytesIO()
            Image.fromarray(part).save(buffer, kind, **options)
            streams.append(buffer.getvalue())
        return streams

    return encode


def decode_images(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    """Undo `image_encoder`: uint8 [count]."""
    from PIL import Image

    parts = []
    for stream in streams:
        with Image.open(io.BytesIO(stream)) as image:
            parts.append(np.asarray(image).reshape(-1))
    return np.concatenate(parts)


def xz(numbers: Numbers, classes: int) -> list[bytes]:
    return [lzma.compress(numbers.tobytes(), preset=9)]


def unxz(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    return np.frombuffer(lzma.decompress(streams[0]), np.uint8)


PACKINGS: dict[str, tuple[Encode, Decode]] = {
    "planes of bits + zstd": (pack_bits, unpack_bits),
    "xz": (xz, unxz),
    "PNG": (image_encoder("PNG", optimize=True), decode_images),
    "JPEG 2000, reversible": (
        image_encoder("JPEG2000", irreversible=False, no_jp2=True),
        decode_images,
    ),
}


def lossless_categories(
    data: NDArray[np.float32],
    valid: NDArray[np.bool_],
    features: Sequence[Feature],
    mosaic: Mosaic,
) -> dict[str, PackingResult]:
    """Pack every categorical feature in every way.

    Parameters
    ----------
    data, valid
        float32 and bool [N, T, Y, X, F].
    features
        The cube's features.
    mosaic
        Where the blocks lie.

    Returns
    -------
    dict
        A result for each categorical feature, by name.
    """
    found = {}
    for index, feature in enumerate(features):
        if feature.kind == "categorical":
            numbers = class_numbers(data[..., index], valid[..., index], feature.codes)
            known = valid[..., index : index + 1]
            found[feature.name] = _packed(numbers, known, len(feature.codes), mosaic)
    return found


def _packed(
    numbers: Numbers, valid: NDArray[np.bool_], classes: int, mosaic: Mosaic
) -> PackingResult:
    """numbers: uint8 [N, T, Y, X]; valid: bool [N, T, Y, X, 1]."""
    sizes = {"zstd, stored chunks of 256 blocks": _in_stored_chunks(numbers)}
    laid = mosaic.lay(numbers[..., None])[..., 0]
    for name, (encode, decode) in PACKINGS.items():
        # Left out rather than refused: the other packings still give a bound.
        if "JPEG 2000" in name and missing_openjpeg():
            continue
        start = time.perf_counter()
        streams = encode(laid, classes)
        middle = time.perf_counter()
        # Decoded for its time alone; a test compares the numbers.
        decode(streams, classes, laid.size)
        sizes[name] = {
            "bytes": sum(map(len, streams)),
            "encode_seconds": middle - start,
            "decode_seconds": time.perf_counter() - middle,
        }

    mask, count = mask_bytes(valid), max(1, int(valid.sum()))
    for size in sizes.values():
        # The bits of `valid` are charged as for all codecs; otherwise packings that code missing
        # values as a class would look cheaper.
        size["bytes"] += mask
        size["bits_per_value"] = 8 * size["bytes"] / count

    best = min(sizes, key=lambda name: sizes[name]["bytes"])
    return {
        "best": best,
        "bits_per_value": sizes[best]["bits_per_value"],
        "packings": sizes,
    }


def _in_stored_chunks(numbers: Numbers) -> Packing:
    """The way a version's own arrays are stored."""
    rows = numbers.reshape(len(numbers), -1)
    spec = ArraySpec(
        "class",
        rows.shape,
        "uint8",
        ("sample", "voxel"),
        (256, rows.shape[1]),
        None,
        Codec("zstd", 9),
    )
    start = time.perf_counter()
    size = packed_bytes(rows, spec)
    return {"bytes": size, "encode_seconds": time.perf_counter() - start}
