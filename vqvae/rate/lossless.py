"""Lossless packings of a categorical feature, to set beside what a VQ-VAE keeps of it: the best of
several counts.

Classes are numbered from 0 in the order of their codes; what is missing is class 0 and told apart
by the bits of `valid`, charged to every packing. Streams hold all held-out blocks, pictures as many
rows as Pillow will open; only the first can be read by stored chunk.
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

from vqvae.rate.baselines import mask_bytes
from vqvae.rate.measure import packed_bytes
from vqvae.rate.mosaic import Mosaic
from vqvae.rate.picture_codecs import absent_codecs, row_parts
from warehouse.format.schema import ArraySpec, Codec
from warehouse.layouts.cube_geometry import Feature

__all__ = ["PACKINGS", "class_numbers", "lossless_categories", "unpack_bits"]

Numbers = NDArray[np.uint8]


def class_numbers(values: NDArray[Any], valid: NDArray[np.bool_], codes: Sequence[int]) -> Numbers:
    """uint8 places in the sorted codes, 0 where missing. values: codes as floats."""
    order = np.sort(np.array(codes, np.float32))
    return np.searchsorted(order, np.where(valid, values, order[0])).astype(np.uint8)


def pack_bits(numbers: Numbers, classes: int) -> list[bytes]:
    """The fewest whole bits a number, as planes of bits, through Blosc-zstd."""
    flat, width = numbers.reshape(-1), max(1, (classes - 1).bit_length())
    planes = np.stack([np.packbits(flat >> plane & 1) for plane in range(width)])
    return [bytes(blosc.compress(planes, b"zstd", 9, 0, 0, 1))]


def unpack_bits(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    """The inverse of `pack_bits`: uint8 [count]."""
    planes = np.frombuffer(blosc.decompress(streams[0]), np.uint8).reshape(
        max(1, (classes - 1).bit_length()), -1
    )
    bits = np.unpackbits(planes, axis=1, count=count)
    out: Numbers = np.bitwise_or.reduce(
        bits << np.arange(len(bits), dtype=np.uint8)[:, None], axis=0
    )
    return out


def as_picture(kind: str, **options: Any) -> Callable[[Numbers, int], list[bytes]]:
    """Planes below each other as one grey picture, or several where it would be too large. numbers:
    [time, rows, columns].
    """

    def encode(numbers: Numbers, classes: int) -> list[bytes]:
        from PIL import Image

        streams = []
        for part in row_parts(numbers.reshape(-1, numbers.shape[-1]), axis=0):
            buffer = io.BytesIO()
            Image.fromarray(part).save(buffer, kind, **options)
            streams.append(buffer.getvalue())
        return streams

    return encode


def from_pictures(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    from PIL import Image

    parts = []
    for stream in streams:
        with Image.open(io.BytesIO(stream)) as picture:
            parts.append(np.asarray(picture).reshape(-1))
    return np.concatenate(parts)


def xz(numbers: Numbers, classes: int) -> list[bytes]:
    return [lzma.compress(numbers.tobytes(), preset=9)]


def unxz(streams: Sequence[bytes], classes: int, count: int) -> Numbers:
    return np.frombuffer(lzma.decompress(streams[0]), np.uint8)


PACKINGS: dict[
    str,
    tuple[Callable[[Numbers, int], list[bytes]], Callable[[Sequence[bytes], int, int], Numbers]],
] = {
    "planes of bits + zstd": (pack_bits, unpack_bits),
    "xz": (xz, unxz),
    "PNG": (as_picture("PNG", optimize=True), from_pictures),
    "JPEG 2000, reversible": (
        as_picture("JPEG2000", irreversible=False, no_jp2=True),
        from_pictures,
    ),
}
"""name -> (encode numbers [time, rows, columns] of so many classes to streams, decode to [count]).
"""


def lossless_categories(
    data: NDArray[np.float32], valid: NDArray[np.bool_], features: Sequence[Feature], mosaic: Mosaic
) -> dict[str, dict[str, Any]]:
    """{feature: {best, bits_per_value, packings: {name: {bytes, bits_per_value, encode_seconds,
    decode_seconds}}}}.

    data, valid: [N, T, Y, X, F]. Rates are over the feature's valid values.
    """
    out = {}
    for at, feature in enumerate(features):
        if feature.kind != "categorical":
            continue
        numbers = class_numbers(data[..., at], valid[..., at], feature.codes)
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
        sizes: dict[str, Any] = {
            "zstd, stored chunks of 256 blocks": {"bytes": packed_bytes(rows, spec)}
        }
        sizes["zstd, stored chunks of 256 blocks"]["encode_seconds"] = time.perf_counter() - start
        laid = mosaic.lay(numbers[..., None])[..., 0]
        for name, (encode, decode) in PACKINGS.items():
            if "JPEG 2000" in name and "JPEG 2000" in absent_codecs():
                continue
            start = time.perf_counter()
            streams = encode(laid, len(feature.codes))
            middle = time.perf_counter()
            decode(streams, len(feature.codes), laid.size)
            seconds = {
                "encode_seconds": middle - start,
                "decode_seconds": time.perf_counter() - middle,
            }
            sizes[name] = {"bytes": sum(map(len, streams))} | seconds
        mask, count = mask_bytes(valid[..., at : at + 1]), max(1, int(valid[..., at].sum()))
        for each in sizes.values():
            each["bytes"] += mask
            each["bits_per_value"] = 8 * each["bytes"] / count
        best = min(sizes, key=lambda name: sizes[name]["bytes"])
        out[feature.name] = {
            "best": best,
            "bits_per_value": sizes[best]["bits_per_value"],
            "packings": sizes,
        }
    return out
