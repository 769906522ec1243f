"""Other codecs on the same held-out values: what a VQ-VAE has to beat, each with its real bytes.

All work on continuous features divided by their range, so that a mean square error is the one of
rate.py. Each is charged the bits of `valid` too, as the codes are. Principal components are
orthonormal: a quantiser's error in them is the error of the values. Bases are fitted on training
blocks and counted apart, as a decoder is. Codecs of pictures and of arrays are in
picture_codecs.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from vqvae.rate.mosaic import Mosaic, filled
from vqvae.rate.picture_codecs import Coded, absent_codecs, jpeg2000, sz3, zfp

__all__ = ["Blocks", "absent_baselines", "baseline_points", "components", "mask_bytes"]

Array = NDArray[np.float32]
COARSE = (5.0, 8.0, 11.0, 14.0, 17.0, 20.0, 26.0)
KEPT = (1, 2, 4, 8, 16, 32, 64)
PIXEL_KEPT = (1, 2, 3, 5, 8, 12)
MANTISSAS = (10, 8, 6, 4, 2)
LEVEL_BITS = (8, 7, 6, 5, 4, 3, 2)
BITS = (0, 1, 2, 3, 5)
GROUP = 256
DEAD_ZONE = 0.6
"""Scores under this many steps become 0.

At low rates cheaper than rounding at equal error (docs/log.md).
"""
MOST_COMPONENTS = 2048
"""An eigenbasis of more takes minutes."""
WITH_DATES = "PCA over features and dates + JPEG 2000"


@dataclass(frozen=True)
class Blocks:
    """Blocks of continuous features. values: float32 [N, T, Y, X, C], scaled, 0 where missing.

    valid: bool, the same shape.
    """

    values: Array
    valid: NDArray[np.bool_]
    mosaic: Mosaic


def components(rows: Array) -> Array:
    """Orthonormal principal directions [D, D] of rows [n, D] about zero, strongest first."""
    _, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    return np.ascontiguousarray(vectors[:, ::-1]).astype(np.float32)


def mask_bytes(valid: NDArray[np.bool_]) -> int:
    """Bytes of the bits of `valid` [N, T, Y, X, C], packed and compressed as the codes' are."""
    return sum(map(len, _zstd(np.packbits(valid.reshape(len(valid), -1), axis=1))))


def baseline_points(train: Blocks, held: Blocks) -> Iterator[Coded]:
    """Every codec that is there at every rate, one after the other; guess.

    Float32 [N, T, Y, X, C] of `held`.
    """
    mask, absent = mask_bytes(held.valid), absent_codecs()
    for coded in _points(train, held, absent):
        yield replace(coded, bytes=coded.bytes + mask)


def absent_baselines(train: Blocks, held: Blocks) -> dict[str, str]:
    """What `baseline_points` leaves out: {codec: reason}."""
    absent = absent_codecs()
    reason = None if "JPEG 2000" in absent else _no_basis_with_dates(train, held.mosaic)
    return absent if reason is None else absent | {WITH_DATES: reason}


def _points(train: Blocks, held: Blocks, absent: dict[str, str]) -> Iterator[Coded]:
    start = time.perf_counter()
    laid = filled(held.mosaic.lay(held.values), held.mosaic.lay(held.valid))
    filling = time.perf_counter() - start

    def cut(coded: Coded, seconds: float = filling) -> Coded:
        return replace(
            coded, guess=held.mosaic.cut(coded.guess), encode_seconds=coded.encode_seconds + seconds
        )

    if "JPEG 2000" not in absent:
        yield from map(cut, _jpeg2000(train, laid, held.mosaic))
    smooth = held.mosaic.cut(laid)
    yield from _pca_int8(
        "PCA of pixels' time series + int8 + zstd", train.values, smooth, (1, 1), PIXEL_KEPT
    )
    patch = _patch(train.values, 4)
    yield from _pca_int8(
        f"PCA of {patch} x {patch} patches + int8 + zstd",
        train.values,
        smooth,
        (patch, patch),
        KEPT,
    )
    patch = _patch(train.values, 8)
    yield from _pca_one_step(
        f"PCA of {patch} x {patch} patches, one step for all, + zstd",
        train.values,
        smooth,
        (patch, patch),
    )
    truth, valid = held.mosaic.lay(held.values), held.mosaic.lay(held.valid)
    # Zeros, not a smooth filling: ZFP passes over blocks of them.
    yield from (cut(each, 0.0) for each in ([] if "ZFP" in absent else zfp(truth, valid)))
    yield from map(cut, [] if "SZ3" in absent else sz3(laid, valid))
    yield from _simple_points(held.values)


def _jpeg2000(train: Blocks, laid: Array, mosaic: Mosaic) -> Iterator[Coded]:
    count = laid.shape[3]
    yield from jpeg2000("JPEG 2000", laid, np.eye(count, dtype=np.float32))
    yield from jpeg2000(
        "PCA over features + JPEG 2000", laid, components(train.values.reshape(-1, count))
    )
    if _no_basis_with_dates(train, mosaic) is None:
        series = train.mosaic.lay(train.values)[:, _at_every_date(train)].transpose(1, 0, 2)
        yield from jpeg2000(
            WITH_DATES, laid, components(series.reshape(len(series), -1)), dates=True
        )


def _at_every_date(train: Blocks) -> NDArray[np.bool_]:
    """Pixels [rows, columns] that blocks of all dates cover."""
    covered: NDArray[np.bool_] = train.mosaic.lay(np.ones((*train.values.shape[:-1], 1), bool))[
        ..., 0
    ].all(axis=0)
    return covered


def _no_basis_with_dates(train: Blocks, held: Mosaic) -> str | None:
    """Why no basis over features and dates of the held-out blocks can be learnt, if so."""
    if not np.array_equal(train.mosaic.times, held.times):
        return "the training and the held-out blocks drawn are not of the same dates"
    size = train.mosaic.shape[0] * train.values.shape[-1]
    if size > MOST_COMPONENTS:
        return f"dates x features are {size} components, and a basis of more than {MOST_COMPONENTS} takes minutes"
    found = int(_at_every_date(train).sum())
    return (
        None
        if found > 2 * size
        else f"{found} training pixels have all dates, and {size} components want more than {2 * size}"
    )


def _simple_points(blocks: Array) -> Iterator[Coded]:
    for bits in MANTISSAS:
        yield _simple(
            "float16, mantissa rounded, + zstd",
            f"{bits} of 10 bits",
            blocks,
            lambda value, bits=bits: _rounded(value.astype(np.float16), bits),
            lambda value: value,
        )
    low, high = (getattr(blocks, each)(axis=(0, 1, 2, 3)) for each in ("min", "max"))
    for bits in LEVEL_BITS:
        step = np.maximum((high - low) / np.float32((1 << bits) - 1), np.float32(1e-9))
        yield _simple(
            "int8 + zstd",
            f"{1 << bits} levels",
            blocks,
            lambda value, step=step: np.round((value - low) / step).astype(np.uint8),
            lambda value, step=step: value * step + low,
            extra=low.nbytes + step.nbytes,
        )
    for bits in BITS:
        yield _simple(
            "bit rounding + zstd",
            f"{bits} bits",
            blocks,
            lambda value, bits=bits: _rounded(value, bits),
            lambda value: value,
        )


def _simple(
    name: str,
    setting: str,
    blocks: Array,
    encode: Callable[[Array], Any],
    decode: Callable[[Any], Array],
    extra: int = 0,
) -> Coded:
    start = time.perf_counter()
    kept = encode(blocks)
    packed = _zstd(kept)
    middle = time.perf_counter()
    guess = decode(kept).astype(np.float32)
    return Coded(
        name,
        setting,
        sum(map(len, packed)) + extra,
        guess,
        middle - start,
        _unpacked_seconds(packed, middle),
    )


def _unpacked_seconds(packed: Sequence[bytes], start: float) -> float:
    """Seconds since `start`, decompressing included."""
    for part in packed:
        blosc.decompress(part)
    return time.perf_counter() - start


def _zstd(rows: NDArray[Any]) -> list[bytes]:
    """Blosc-zstd buffers of groups of rows, features apart.

    Shuffled by bytes or by bits, whichever is smaller.
    """
    size = rows.dtype.itemsize
    parts = [
        np.ascontiguousarray(np.moveaxis(rows[first : first + GROUP], -1, 0))
        for first in range(0, len(rows), GROUP)
    ]
    ways = [
        [
            blosc.compress(
                part.view(np.uint8).reshape(-1)[at : at + (1 << 30)], b"zstd", 9, shuffle, 0, size
            )
            for part in parts
            for at in range(0, part.nbytes, 1 << 30)
        ]
        for shuffle in (int(size > 1), 2)
    ]
    return min(ways, key=lambda way: sum(map(len, way)))


def _rounded(value: NDArray[Any], bits: int) -> NDArray[Any]:
    """float16 or float32 with `bits` of its mantissa kept, rounded to nearest even (Zender 2016,
    doi 10.5194/gmd-9-3199-2016).
    """
    word, whole = (np.uint16, 10) if value.dtype == np.float16 else (np.uint32, 23)
    drop = whole - bits
    if not drop:
        return value
    raw = value.view(word)
    half = word((1 << (drop - 1)) - 1)
    out: NDArray[Any] = (
        (raw + half + ((raw >> word(drop)) & word(1)))
        & word(np.iinfo(word).max ^ ((1 << drop) - 1))
    ).view(value.dtype)
    return out


def _patch(train: Array, most: int) -> int:
    """Edge of patches.

    At most `most`, a divisor of the blocks' edges, with an eigenbasis that is small and well
    determined.
    """
    n, t, y, x, count = train.shape
    for edge in (8, 4, 2):
        size = t * edge * edge * count
        enough = n * (y // edge) * (x // edge) >= 2 * size
        if edge <= most and y % edge == x % edge == 0 and size <= MOST_COMPONENTS and enough:
            return edge
    return 1


def _basis(train: Array, patch: tuple[int, int]) -> tuple[Array, Array]:
    """(principal directions, training rows) of patches."""
    rows = _folded(train, patch)
    rows = rows.reshape(-1, rows.shape[-1])
    return components(rows), rows


def _pca_int8(
    name: str, train: Array, blocks: Array, patch: tuple[int, int], kept: Sequence[int]
) -> Iterator[Coded]:
    basis, rows = _basis(train, patch)
    step = np.maximum(np.abs(rows @ basis[:, : max(kept)]).max(axis=0), 1e-6) / 127
    for number in sorted({min(number, basis.shape[1]) for number in kept}):
        start = time.perf_counter()
        scores = _folded(blocks, patch) @ basis[:, :number]
        numbers = np.clip(np.round(scores / step[:number]), -128, 127).astype(np.int8)
        packed = _zstd(numbers)
        middle = time.perf_counter()
        guess = _unfolded(
            (numbers * step[:number]).astype(np.float32) @ basis[:, :number].T, blocks.shape, patch
        )
        yield Coded(
            name,
            f"{number} components",
            sum(map(len, packed)),
            guess,
            middle - start,
            _unpacked_seconds(packed, middle),
            basis[:, :number].nbytes + step[:number].nbytes,
        )


def _pca_one_step(
    name: str, train: Array, blocks: Array, patch: tuple[int, int]
) -> Iterator[Coded]:
    """All components with the step of one target error (a uniform quantiser's is step^2 / 12).

    Weak ones become zeros.
    """
    basis, _ = _basis(train, patch)
    for quality in COARSE:
        step = np.float32(math.sqrt(12 * 10 ** (-quality / 10)))
        start = time.perf_counter()
        scores = _folded(blocks, patch) @ basis / step
        numbers = (
            (np.sign(scores) * np.floor(np.abs(scores) + 1 - DEAD_ZONE))
            .clip(-32_768, 32_767)
            .astype(np.int16)
        )
        packed = _zstd(numbers)
        middle = time.perf_counter()
        guess = _unfolded((numbers * step).astype(np.float32) @ basis.T, blocks.shape, patch)
        yield Coded(
            name,
            f"step of {quality:g} dB",
            sum(map(len, packed)),
            guess,
            middle - start,
            _unpacked_seconds(packed, middle),
            basis.nbytes,
        )


def _folded(blocks: Array, patch: tuple[int, int]) -> Array:
    """[N, T, Y, X, C] to [N, Y / py, X / px, T * py * px * C]."""
    n, t, y, x, c = blocks.shape
    py, px = patch
    cut = blocks.reshape(n, t, y // py, py, x // px, px, c).transpose(0, 2, 4, 1, 3, 5, 6)
    return np.ascontiguousarray(cut.reshape(n, y // py, x // px, -1))


def _unfolded(rows: Array, shape: Sequence[int], patch: tuple[int, int]) -> Array:
    n, t, y, x, c = shape
    py, px = patch
    return (
        rows.reshape(n, y // py, x // px, t, py, px, c)
        .transpose(0, 3, 1, 4, 2, 5, 6)
        .reshape(n, t, y, x, c)
    )
