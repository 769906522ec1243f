"""JPEG 2000 (Pillow's OpenJPEG, irreversible 9-7 wavelet, 16 bits) on mosaics of blocks.

All dates and components lie below each other in one codestream. One stream has one header, and its
rate allocation cuts all components where the error falls equally fast a byte: on NAIP worth 0.5 to
2 dB against a stream a component at one error each (docs/log.md). No block of such a stream can be
decoded alone, as the codes of a VQ-VAE can.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqvae.rate.codecs.base import Array, Blocks, Encoded, RateCodec, Setting
from vqvae.rate.codecs.pca import MOST_COMPONENTS, components
from vqvae.rate.mosaic import Mosaic

__all__ = [
    "Jpeg2000",
    "Jpeg2000OverDates",
    "Jpeg2000OverFeatures",
    "missing_openjpeg",
    "row_parts",
]

QUALITIES = (14.0, 17.0, 20.0, 23.0, 26.0, 29.0, 32.0, 36.0)

STREAM_PIXELS = 1 << 26
"""Pixels of one codestream: under the number from which Pillow refuses an image as an attack."""


@dataclass(frozen=True)
class Quality(Setting):
    """One quality over one basis.

    Parameters
    ----------
    decibel
        Of the mean square error.
    basis
        Orthonormal, float32 [C, C] or [T * C, T * C].
    """

    decibel: float
    basis: Array


class Jpeg2000(RateCodec[Quality]):
    """Features as they are, a plane each."""

    name = "JPEG 2000"
    family = "JPEG 2000"
    on_mosaic = True
    fill = True

    def missing(self) -> str | None:
        return missing_openjpeg()

    def basis(self, train: Blocks) -> Array:
        """Return the orthonormal directions whose scores are the planes."""
        # The identity makes features the planes, and costs no bytes (`qualities`).
        return np.eye(train.values.shape[-1], dtype=np.float32)

    def settings(self, train: Blocks, values: Array) -> Sequence[Quality]:
        return qualities(self.basis(train))

    def encode(self, values: Array, setting: Quality) -> Encoded:
        planes = _planes(values, setting.basis)
        # One factor for all planes: with one each, OpenJPEG would allocate bits over errors that do
        # not compare.
        scale = 32_767 / max(float(np.abs(planes).max()), 1e-6)
        streams = [
            encode_planes(part, scale, setting.decibel) for part in row_parts(planes, axis=1)
        ]
        return Encoded(streams, scale)

    def decode(self, encoded: Encoded, setting: Quality, shape: tuple[int, ...]) -> Array:
        dates, _, columns, features = shape
        parts = [
            _decode_planes(stream, encoded.scale).reshape(dates * features, -1, columns)
            for stream in encoded.streams
        ]
        planes = np.concatenate(parts, axis=1)
        return _values(planes, setting.basis, shape).astype(np.float32)


class Jpeg2000OverFeatures(Jpeg2000):
    """Principal components of the features, a plane a date and component."""

    name = "PCA over features + JPEG 2000"

    def basis(self, train: Blocks) -> Array:
        return components(train.values.reshape(-1, train.values.shape[-1]))


class Jpeg2000OverDates(Jpeg2000):
    """Principal components of features and dates, a plane a component."""

    name = "PCA over features and dates + JPEG 2000"

    def obstacle(self, train: Blocks, held: Mosaic) -> str | None:
        # A basis over dates is of certain dates: components of others would mean nothing.
        if not np.array_equal(train.mosaic.times, held.times):
            return "the training and the held-out blocks drawn are not of the same dates"

        size = train.mosaic.shape[0] * train.values.shape[-1]
        if size > MOST_COMPONENTS:
            return (
                f"dates x features are {size} components,"
                f" and a basis of more than {MOST_COMPONENTS} takes minutes"
            )

        found = int(_with_every_date(train).sum())
        # With fewer rows the weak directions are noise.
        if found <= 2 * size:
            return (
                f"{found} training pixels have all dates,"
                f" and {size} components want more than {2 * size}"
            )
        return None

    def basis(self, train: Blocks) -> Array:
        laid = train.mosaic.lay(train.values)
        series = laid[:, _with_every_date(train)].transpose(1, 0, 2)
        return components(series.reshape(len(series), -1))


def missing_openjpeg() -> str | None:
    """Return why Pillow cannot write JPEG 2000, or None."""
    from PIL import features

    if features.check_codec("jpg_2000"):
        return None
    return "this Pillow was built without OpenJPEG"


def qualities(basis: Array) -> list[Quality]:
    """Return the rate settings over a basis; the identity needs no bytes."""
    learned = 0 if np.array_equal(basis, np.eye(len(basis))) else basis.nbytes
    return [Quality(f"{quality:g} dB", learned, quality, basis) for quality in QUALITIES]


def row_parts(planes: NDArray[Any], axis: int) -> list[NDArray[Any]]:
    """Split planes along the axis of rows into images of about STREAM_PIXELS at most."""
    count = min(planes.shape[axis], -(-planes.size // STREAM_PIXELS))
    return np.array_split(planes, count, axis=axis)


def encode_planes(planes: Array, scale: float, quality: float) -> bytes:
    """Encode planes to one raw codestream.

    Parameters
    ----------
    planes
        float32 [n, rows, columns].
    scale
        Factor to 16-bit integers.
    quality
        Target: a mean square error of 10^(-quality / 10) over `planes`.
    """
    from PIL import Image

    # OpenJPEG measures its quality against the peak of the 16 bits; 0 or less would mean lossless.
    decibel = max(1.0, float(quality + 20 * np.log10(65_535 / scale)))
    numbers = (np.round(planes * scale) + 32_768).clip(0, 65_535)
    stack = numbers.astype(np.uint16).reshape(-1, planes.shape[2])

    buffer = io.BytesIO()
    Image.fromarray(stack).save(
        buffer,
        "JPEG2000",
        # Raw codestreams of the lossy wavelet: the boxes of a JP2 file would add bytes to every
        # stream.
        irreversible=True,
        no_jp2=True,
        quality_mode="dB",
        quality_layers=[decibel],
    )
    return buffer.getvalue()


def _decode_planes(stream: bytes, scale: float) -> Array:
    """Return float32 [n * rows, columns]."""
    from PIL import Image

    with Image.open(io.BytesIO(stream)) as image:
        numbers = np.asarray(image).astype(np.float32)
    planes: Array = (numbers - 32_768) / np.float32(scale)
    return planes


def _planes(values: Array, basis: Array) -> Array:
    """[time, rows, columns, C] to scores [time * C, rows, columns] of either kind of basis."""
    dates, rows, columns, features = values.shape
    if len(basis) == features:
        scores = (values @ basis).transpose(3, 0, 1, 2)
        return np.ascontiguousarray(scores).reshape(-1, rows, columns)

    series = values.transpose(1, 2, 0, 3).reshape(rows, columns, dates * features)
    return np.ascontiguousarray((series @ basis).transpose(2, 0, 1))


def _values(planes: Array, basis: Array, shape: tuple[int, ...]) -> Array:
    """Undo `_planes`."""
    dates, rows, columns, features = shape
    if len(basis) == features:
        scores = planes.reshape(features, dates, rows, columns)
        return scores.transpose(1, 2, 3, 0) @ basis.T

    series = planes.transpose(1, 2, 0) @ basis.T
    return series.reshape(rows, columns, dates, features).transpose(2, 0, 1, 3)


def _with_every_date(train: Blocks) -> NDArray[np.bool_]:
    """Return the pixels [rows, columns] that blocks of all dates cover."""
    covered = train.mosaic.lay(np.ones((*train.values.shape[:-1], 1), bool))
    every: NDArray[np.bool_] = np.all(covered[..., 0], axis=0)
    return every
