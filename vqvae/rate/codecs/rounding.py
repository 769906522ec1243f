"""Rounded numbers through zstd: the simplest lossy codecs.

They encode blocks as they are, with zeros where values are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqvae.rate.codecs.base import Array, Blocks, Encoded, RateCodec, Setting
from vqvae.rate.codecs.streams import zstd_pack, zstd_unpack

__all__ = ["BitRounding", "Float16", "Int8", "round_mantissa"]

FLOAT16_BITS = (10, 8, 6, 4, 2)
FLOAT32_BITS = (0, 1, 2, 3, 5)
LEVEL_BITS = (8, 7, 6, 5, 4, 3, 2)
FLOAT16_MANTISSA, FLOAT32_MANTISSA = 10, 23


@dataclass(frozen=True)
class Bits(Setting):
    """Bits of the mantissa that are kept."""

    bits: int


@dataclass(frozen=True)
class Levels(Setting):
    """Even levels over each feature's range. low, step: float32 [C]."""

    low: Array
    step: Array


class Float16(RateCodec[Bits]):
    """float16 with a rounded mantissa."""

    name = "float16, mantissa rounded, + zstd"

    def settings(self, train: Blocks, values: Array) -> Sequence[Bits]:
        return [Bits(f"{bits} of {FLOAT16_MANTISSA} bits", 0, bits) for bits in FLOAT16_BITS]

    def encode(self, values: Array, setting: Bits) -> Encoded:
        return Encoded(zstd_pack(round_mantissa(values.astype(np.float16), setting.bits)))

    def decode(self, encoded: Encoded, setting: Bits, shape: tuple[int, ...]) -> Array:
        return zstd_unpack(encoded.streams, np.float16, shape).astype(np.float32)


class BitRounding(RateCodec[Bits]):
    """float32 with a rounded mantissa."""

    name = "bit rounding + zstd"

    def settings(self, train: Blocks, values: Array) -> Sequence[Bits]:
        return [Bits(f"{bits} bits", 0, bits) for bits in FLOAT32_BITS]

    def encode(self, values: Array, setting: Bits) -> Encoded:
        return Encoded(zstd_pack(round_mantissa(values, setting.bits)))

    def decode(self, encoded: Encoded, setting: Bits, shape: tuple[int, ...]) -> Array:
        return zstd_unpack(encoded.streams, np.float32, shape)


class Int8(RateCodec[Levels]):
    """Even levels between the least and the greatest value of each feature."""

    name = "int8 + zstd"

    def settings(self, train: Blocks, values: Array) -> Sequence[Levels]:
        low, high = values.min(axis=(0, 1, 2, 3)), values.max(axis=(0, 1, 2, 3))
        found = []
        for bits in LEVEL_BITS:
            exact = (high - low) / np.float32((1 << bits) - 1)
            # A feature that never varies would divide by zero.
            step = np.maximum(exact, np.float32(1e-9))
            found.append(Levels(f"{1 << bits} levels", 0, low, step))
        return found

    def encode(self, values: Array, setting: Levels) -> Encoded:
        numbers = np.round((values - setting.low) / setting.step).astype(np.uint8)
        # The levels belong to these blocks, so their bytes are charged with the numbers.
        levels = np.stack([setting.low, setting.step]).tobytes()
        return Encoded([*zstd_pack(numbers), levels])

    def decode(self, encoded: Encoded, setting: Levels, shape: tuple[int, ...]) -> Array:
        *streams, levels = encoded.streams
        low, step = np.frombuffer(levels, np.float32).reshape(2, -1)
        numbers = zstd_unpack(streams, np.uint8, shape)
        return (numbers * step + low).astype(np.float32)


def round_mantissa(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """Round to `bits` of the mantissa, ties to even.

    Parameters
    ----------
    values
        float16 or float32.
    bits
        0 to 10, or 0 to 23.

    Returns
    -------
    numpy.ndarray
        The same type and shape. The dropped bits are 0, which zstd packs well.

    Notes
    -----
    Bit rounding as in Zender 2016, doi:10.5194/gmd-9-3199-2016.
    """
    half_precision = values.dtype == np.float16
    width, mantissa = (16, FLOAT16_MANTISSA) if half_precision else (32, FLOAT32_MANTISSA)
    drop = mantissa - bits
    if not drop:
        return values

    raw: NDArray[Any] = values.view(np.uint16 if half_precision else np.uint32)
    last_kept_bit = (raw >> drop) & 1
    almost_half = (1 << (drop - 1)) - 1
    kept = (1 << width) - (1 << drop)
    rounded: NDArray[Any] = (raw + almost_half + last_kept_bit) & kept
    return rounded.view(values.dtype)
