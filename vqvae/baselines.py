"""Other codecs on the same held-out values: what a VQ-VAE has to beat, each with its real bytes.

All work on continuous features divided by their range, missing values replaced by the training mean, so that a mean square error is the
one of rate.py. Principal components are orthonormal: one target error for all components is the best split of bits (reverse water-
filling), and a component whose variance is under the target is left out. Bases are fitted on training blocks and not counted as bytes.
JPEG 2000 (Pillow's OpenJPEG, irreversible 9-7 wavelet, 16 bits, raw codestreams) sees all held-out blocks and dates of a component as
one picture, so that headers cost next to nothing; such a stream cannot be decoded by block as the codes can. Given up: ZFP and SZ3,
which no dependency brings.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

__all__ = ["Coded", "Mosaic", "baseline_points", "components"]

Array = NDArray[np.float32]
COARSE = (8.0, 11.0, 14.0, 17.0, 20.0, 26.0, 33.0)
QUALITIES = (20.0, 23.0, 26.0, 28.0, 30.0, 33.0, 36.0)
KEPT = (1, 2, 4, 8, 16, 32, 64)
PIXEL_KEPT = (1, 2, 3, 5, 8, 12)
BITS = (1, 2, 3, 5, 7)
GROUP = 256


@dataclass(frozen=True, slots=True)
class Coded:
    """One codec at one rate. guess: float32 [N, T, Y, X, C] of the blocks' scaled values."""

    codec: str
    setting: str
    bytes: int
    guess: Array
    encode_seconds: float
    decode_seconds: float


class Mosaic:
    """Held-out blocks laid out as pictures: label blocks below each other, [time, rows, columns].

    origins: int64 [N, 3] of inner chunks; inner, block: (time, y, x) in voxels.
    """

    def __init__(self, origins: NDArray[np.int64], inner: Sequence[int], block: Sequence[int]) -> None:
        self.inner = tuple(inner)
        where = origins[:, 1:] // np.array(block[1:])
        _, number = np.unique(where, axis=0, return_inverse=True)
        times, step = np.unique(origins[:, 0], return_inverse=True)
        inside = origins[:, 1:] % np.array(block[1:])
        self.corners = np.stack([step.reshape(-1) * inner[0], number.reshape(-1) * block[1] + inside[:, 0], inside[:, 1]], axis=1)
        self.block_rows = int(block[1])
        self.shape = (len(times) * inner[0], (int(number.max()) + 1) * block[1], int(block[2]))

    def lay(self, blocks: NDArray[Any], fill: Any = 0) -> NDArray[Any]:
        """[N, T, Y, X, C] to [time, rows, columns, C]."""
        out = np.full((*self.shape, blocks.shape[-1]), fill, blocks.dtype)
        for block, place in zip(blocks, self._places(), strict=True):
            out[place] = block
        return out

    def cut(self, mosaic: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `lay`."""
        return np.stack([mosaic[place] for place in self._places()])

    def _places(self) -> Iterator[tuple[slice, ...]]:
        for corner in self.corners.tolist():
            yield tuple(slice(at, at + size) for at, size in zip(corner, self.inner, strict=True))


def components(rows: Array) -> Array:
    """Orthonormal principal directions [D, D] of rows [n, D] about zero, strongest first."""
    _, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    return np.ascontiguousarray(vectors[:, ::-1]).astype(np.float32)


def baseline_points(train: Array, blocks: Array, mosaic: Mosaic) -> Iterator[Coded]:
    """Every baseline at every rate, one after the other. train, blocks: float32 [n, T, Y, X, C], scaled, 0 where missing."""
    count = blocks.shape[-1]
    basis = components(train.reshape(-1, count))
    laid = mosaic.lay(blocks)
    for name, transform in (("PCA + JPEG 2000", basis), ("JPEG 2000", np.eye(count, dtype=np.float32))):
        for quality in QUALITIES:
            yield _jpeg2000(name, laid, transform, quality, mosaic)
    yield from _pca_int8("PCA of pixels' time series + int8 + zstd", train, blocks, (1, 1), PIXEL_KEPT)
    patch = next(size for size in (4, 2, 1) if mosaic.inner[1] % size == 0 and mosaic.inner[2] % size == 0)
    yield from _pca_int8(f"PCA of {patch} x {patch} patches + int8 + zstd", train, blocks, (patch, patch), KEPT)
    yield from _pca_one_step(f"PCA of {patch} x {patch} patches, one step for all, + zstd", train, blocks, (patch, patch))
    yield _simple("float16 + zstd", "", blocks, lambda value: value.astype(np.float16), lambda value: value.astype(np.float32))
    # 255 steps over a feature's range.
    yield _simple("int8 + zstd", "", blocks, lambda value: np.clip(np.round(value * 127), -128, 127).astype(np.int8),
                  lambda value: value.astype(np.float32) / 127)  # fmt: skip
    for bits in BITS:
        yield _simple("bit rounding + zstd", f"{bits} bits", blocks, lambda value, bits=bits: _rounded(value, bits), lambda value: value)


def _simple(name: str, setting: str, blocks: Array, encode: Callable[[Array], Any], decode: Callable[[Any], Array]) -> Coded:
    start = time.perf_counter()
    kept = encode(blocks)
    packed = _zstd(kept)
    middle = time.perf_counter()
    guess = decode(kept)
    return Coded(name, setting, sum(map(len, packed)), guess, middle - start, time.perf_counter() - middle)


def _zstd(rows: NDArray[Any]) -> list[bytes]:
    """Blosc-zstd buffers of groups of rows, features apart: shuffled by bytes, as the codes are."""
    size = rows.dtype.itemsize
    parts = (np.ascontiguousarray(np.moveaxis(rows[first : first + GROUP], -1, 0)) for first in range(0, len(rows), GROUP))
    return [blosc.compress(part.view(np.uint8).reshape(-1)[at : at + (1 << 30)], b"zstd", 9, int(size > 1), 0, size)
            for part in parts for at in range(0, part.nbytes, 1 << 30)]  # fmt: skip


def _rounded(value: Array, bits: int) -> Array:
    """float32 with `bits` of its mantissa kept, rounded to nearest (Zender 2016, doi 10.5194/gmd-9-3199-2016)."""
    raw = value.view(np.uint32)
    drop = 23 - bits
    out: Array = ((raw + np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))) & ~np.uint32((1 << drop) - 1)).view(
        np.float32
    )
    return out


def _pca_int8(name: str, train: Array, blocks: Array, patch: tuple[int, int], kept: Sequence[int]) -> Iterator[Coded]:
    basis = components(_folded(train, patch).reshape(-1, train.shape[1] * patch[0] * patch[1] * train.shape[-1]))
    spread = np.abs(_folded(train, patch) @ basis[:, : max(kept)]).reshape(-1, min(max(kept), basis.shape[1])).max(axis=0)
    step = np.maximum(spread, 1e-6) / 127
    for number in sorted({min(number, basis.shape[1]) for number in kept}):
        start = time.perf_counter()
        scores = _folded(blocks, patch) @ basis[:, :number]
        numbers = np.clip(np.round(scores / step[:number]), -128, 127).astype(np.int8)
        packed = _zstd(numbers)
        middle = time.perf_counter()
        guess = _unfolded((numbers * step[:number]).astype(np.float32) @ basis[:, :number].T, blocks.shape, patch)
        yield Coded(name, f"{number} components", sum(map(len, packed)), guess, middle - start, time.perf_counter() - middle)


def _pca_one_step(name: str, train: Array, blocks: Array, patch: tuple[int, int]) -> Iterator[Coded]:
    """All components with the step of one target error (a uniform quantiser's is step^2 / 12): weak ones become zeros."""
    basis = components(_folded(train, patch).reshape(-1, train.shape[1] * patch[0] * patch[1] * train.shape[-1]))
    for quality in COARSE:
        step = np.float32(np.sqrt(12 * 10 ** (-quality / 10)))
        start = time.perf_counter()
        numbers = np.round(_folded(blocks, patch) @ basis / step).clip(-32_768, 32_767).astype(np.int16)
        packed = _zstd(numbers)
        middle = time.perf_counter()
        guess = _unfolded((numbers * step).astype(np.float32) @ basis.T, blocks.shape, patch)
        yield Coded(name, f"{quality:g} dB", sum(map(len, packed)), guess, middle - start, time.perf_counter() - middle)


def _folded(blocks: Array, patch: tuple[int, int]) -> Array:
    """[N, T, Y, X, C] to [N, Y / py, X / px, T * py * px * C]."""
    n, t, y, x, c = blocks.shape
    py, px = patch
    cut = blocks.reshape(n, t, y // py, py, x // px, px, c).transpose(0, 2, 4, 1, 3, 5, 6)
    return np.ascontiguousarray(cut.reshape(n, y // py, x // px, -1))


def _unfolded(rows: Array, shape: Sequence[int], patch: tuple[int, int]) -> Array:
    n, t, y, x, c = shape
    py, px = patch
    return rows.reshape(n, y // py, x // px, t, py, px, c).transpose(0, 3, 1, 4, 2, 5, 6).reshape(n, t, y, x, c)


def _jpeg2000(name: str, laid: Array, basis: Array, quality: float, mosaic: Mosaic) -> Coded:
    """Each component a codestream, its dates below each other, all to the same mean square error 10^(-quality / 10)."""
    from PIL import Image

    start = time.perf_counter()
    planes = laid @ basis
    scale = 32_767 / max(float(np.abs(planes).max()), 1e-6)
    target = 10 ** (-quality / 10)
    # OpenJPEG's fixed quality is against the peak of the 16 bits.
    decibel = 10 * np.log10(65_535**2 / (target * scale**2))
    streams: dict[int, bytes] = {}
    for part in range(planes.shape[-1]):
        plane = planes[..., part].reshape(-1, planes.shape[2])
        if float(np.square(plane).mean()) <= target:
            continue
        buffer = io.BytesIO()
        picture = Image.fromarray((np.round(plane * scale) + 32_768).clip(0, 65_535).astype(np.uint16))
        picture.save(buffer, "JPEG2000", irreversible=True, no_jp2=True, quality_mode="dB", quality_layers=[decibel])
        streams[part] = buffer.getvalue()
    middle = time.perf_counter()
    back = np.zeros_like(planes)
    for part, stream in streams.items():
        with Image.open(io.BytesIO(stream)) as picture:
            back[..., part] = ((np.asarray(picture).astype(np.float32) - 32_768) / scale).reshape(planes.shape[:-1])
    guess = mosaic.cut((back @ basis.T).astype(np.float32))
    return Coded(name, f"{quality:g} dB", sum(map(len, streams.values())), guess, middle - start, time.perf_counter() - middle)
