"""Principal components of patches, quantised, through zstd.

Components are orthonormal, so that the error of a quantiser in them is the error of the values.
Bases are fitted on training blocks and counted apart, as the VQ-VAE's decoder is. Missing values
are filled in smoothly first: a patch has no way to leave one out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqvae.rate.codecs.base import Array, Blocks, Encoded, RateCodec, Setting
from vqvae.rate.codecs.streams import zstd_pack, zstd_unpack

__all__ = ["MOST_COMPONENTS", "OneStepPca", "PatchPca", "PixelPca", "components"]

PATCH_COMPONENTS = (1, 2, 4, 8, 16, 32, 64)
PIXEL_COMPONENTS = (1, 2, 3, 5, 8, 12)
QUALITIES = (5.0, 8.0, 11.0, 14.0, 17.0, 20.0, 26.0)

DEAD_ZONE = 0.6
"""Scores under this many steps become 0: cheaper at equal error than rounding at 0.5
(docs/log.md)."""

MOST_COMPONENTS = 2048
"""An eigenbasis of more takes minutes."""

Patch = tuple[int, int]


@dataclass(frozen=True)
class Int8Components(Setting):
    """Strongest components as int8. basis: float32 [D, n]; step: float32 [n]."""

    patch: Patch
    basis: Array
    step: Array


@dataclass(frozen=True)
class OneStep(Setting):
    """All components with one step. basis: float32 [D, D]."""

    patch: Patch
    basis: Array
    step: np.float32


class Int8Pca(RateCodec[Int8Components]):
    """The strongest components of patches, each over its own range, as int8."""

    fill = True

    @abstractmethod
    def patch(self, train: Blocks) -> Patch:
        """Return the patch's size (y, x) in voxels."""

    @abstractmethod
    def counts(self) -> Sequence[int]:
        """Return how many components to keep, a rate each."""

    def settings(self, train: Blocks, values: Array) -> Sequence[Int8Components]:
        patch, counts = self.patch(train), self.counts()
        basis, rows = _fit(train.values, patch)
        largest = np.abs(rows @ basis[:, : max(counts)]).max(axis=0)
        # A step for each component: with one for all, 8 bits would not span the strongest and still
        # tell the weakest from 0.
        step = np.maximum(largest, 1e-6) / 127

        found = []
        for count in sorted({min(count, basis.shape[1]) for count in counts}):
            kept, steps = basis[:, :count], step[:count]
            size = kept.nbytes + steps.nbytes
            found.append(Int8Components(f"{count} components", size, patch, kept, steps))
        return found

    def encode(self, values: Array, setting: Int8Components) -> Encoded:
        scores = _fold(values, setting.patch) @ setting.basis
        numbers = np.clip(np.round(scores / setting.step), -128, 127).astype(np.int8)
        return Encoded(zstd_pack(numbers))

    def decode(self, encoded: Encoded, setting: Int8Components, shape: tuple[int, ...]) -> Array:
        folded = (*_grid(shape, setting.patch), setting.basis.shape[1])
        numbers = zstd_unpack(encoded.streams, np.int8, folded)
        scores = (numbers * setting.step).astype(np.float32)
        return _unfold(scores @ setting.basis.T, shape, setting.patch)


class PixelPca(Int8Pca):
    """Components of each pixel's time series of features."""

    name = "PCA of pixels' time series + int8 + zstd"

    def patch(self, train: Blocks) -> Patch:
        return 1, 1

    def counts(self) -> Sequence[int]:
        return PIXEL_COMPONENTS


class PatchPca(Int8Pca):
    """Components of patches of up to 4 x 4 pixels at all dates of a block."""

    name = "PCA of patches + int8 + zstd"

    def title(self, train: Blocks) -> str:
        edge, _ = self.patch(train)
        return f"PCA of {edge} x {edge} patches + int8 + zstd"

    def patch(self, train: Blocks) -> Patch:
        edge = patch_edge(train.values, 4)
        return edge, edge

    def counts(self) -> Sequence[int]:
        return PATCH_COMPONENTS


class OneStepPca(RateCodec[OneStep]):
    """A transform codec: all components of patches, quantised with one step."""

    name = "PCA of patches, one step for all, + zstd"
    fill = True

    def title(self, train: Blocks) -> str:
        edge = patch_edge(train.values, 8)
        return f"PCA of {edge} x {edge} patches, one step for all, + zstd"

    def settings(self, train: Blocks, values: Array) -> Sequence[OneStep]:
        edge = patch_edge(train.values, 8)
        basis, _ = _fit(train.values, (edge, edge))

        found = []
        for quality in QUALITIES:
            # The mean square error of a uniform quantiser is step^2 / 12.
            step = np.float32(math.sqrt(12 * 10 ** (-quality / 10)))
            label = f"step of {quality:g} dB"
            found.append(OneStep(label, basis.nbytes, (edge, edge), basis, step))
        return found

    def encode(self, values: Array, setting: OneStep) -> Encoded:
        scores = _fold(values, setting.patch) @ setting.basis / setting.step
        numbers = np.sign(scores) * np.floor(np.abs(scores) + 1 - DEAD_ZONE)
        return Encoded(zstd_pack(numbers.clip(-32_768, 32_767).astype(np.int16)))

    def decode(self, encoded: Encoded, setting: OneStep, shape: tuple[int, ...]) -> Array:
        folded = (*_grid(shape, setting.patch), setting.basis.shape[1])
        numbers = zstd_unpack(encoded.streams, np.int16, folded)
        scores = (numbers * setting.step).astype(np.float32)
        return _unfold(scores @ setting.basis.T, shape, setting.patch)


def components(rows: Array) -> Array:
    """Return the orthonormal principal directions of rows about zero.

    Parameters
    ----------
    rows
        float32 [n, D].

    Returns
    -------
    numpy.ndarray
        float32 [D, D], a direction a column, the strongest first.
    """
    # In float64: with many rows the sums of squares lose the weak directions.
    _, vectors = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    return np.ascontiguousarray(vectors[:, ::-1]).astype(np.float32)


def patch_edge(train: Array, most: int) -> int:
    """Return the largest usable edge of square patches.

    It is at most `most`, divides the blocks' edges, and its eigenbasis is small
    (MOST_COMPONENTS) and well determined: two training patches a component.
    """
    blocks, dates, height, width, features = train.shape
    for edge in (8, 4, 2):
        size = dates * edge * edge * features
        patches = blocks * (height // edge) * (width // edge)
        divides = height % edge == width % edge == 0
        if edge <= most and divides and size <= MOST_COMPONENTS and patches >= 2 * size:
            return edge
    return 1


def _fit(train: Array, patch: Patch) -> tuple[Array, Array]:
    """Return (principal directions, training rows) of patches."""
    rows = _fold(train, patch)
    rows = rows.reshape(-1, rows.shape[-1])
    return components(rows), rows


def _grid(shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """Return (blocks, rows, columns) of patches."""
    return shape[0], shape[2] // patch[0], shape[3] // patch[1]


def _fold(blocks: Array, patch: Patch) -> Array:
    """[N, T, Y, X, C] to [N, Y / py, X / px, T * py * px * C]."""
    n, t, _, _, c = blocks.shape
    py, px = patch
    _, rows, columns = _grid(blocks.shape, patch)
    split = blocks.reshape(n, t, rows, py, columns, px, c).transpose(0, 2, 4, 1, 3, 5, 6)
    return np.ascontiguousarray(split.reshape(n, rows, columns, -1))


def _unfold(patches: Array, shape: Sequence[int], patch: Patch) -> Array:
    """Undo `_fold`."""
    n, t, y, x, c = shape
    py, px = patch
    _, rows, columns = _grid(shape, patch)
    split = patches.reshape(n, rows, columns, t, py, px, c).transpose(0, 3, 1, 4, 2, 5, 6)
    return split.reshape(n, t, y, x, c)
