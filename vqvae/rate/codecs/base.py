"""What a codec of the rate-distortion report is, and how one is measured.

A codec declares its name, whether it can run here, its rate settings, and how it encodes and
decodes one array. Timing, layouts, and the removal of dominated points are done here, once for
all codecs. `registry.py` lists the codecs that are measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vqvae.rate.mosaic import Mosaic, filled

__all__ = [
    "Blocks",
    "Coded",
    "Encoded",
    "RateCodec",
    "Sample",
    "Setting",
    "coded_points",
    "encode_and_decode",
    "front",
]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Blocks:
    """Blocks of continuous features.

    Parameters
    ----------
    values
        float32 [N, T, Y, X, C], each feature less its mean and divided by its
        range; 0 where missing.
    valid
        bool, the same shape.
    mosaic
        Where the blocks lie next to each other.
    """

    values: Array
    valid: NDArray[np.bool_]
    mosaic: Mosaic


@dataclass(frozen=True, slots=True)
class Coded:
    """One codec at one rate.

    Parameters
    ----------
    codec, setting
        Names for the report.
    bytes
        Size of everything that belongs to these values.
    guess
        float32, the decoded values in the shape of what was encoded.
    encode_seconds, decode_seconds
        Wall-clock time of one run on one thread.
    apart
        Bytes of what was learned from training blocks, such as a basis. They
        are needed once for any number of cubes, as a decoder's weights are.
    """

    codec: str
    setting: str
    bytes: int
    guess: Array = field(repr=False)
    encode_seconds: float
    decode_seconds: float
    apart: int = 0


@dataclass(frozen=True)
class Setting:
    """One rate of a codec.

    Parameters
    ----------
    label
        Text for the report.
    learned_bytes
        Bytes of what decoding needs and training blocks determined.
    """

    label: str
    learned_bytes: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """The compressed streams of one array, and one factor that the decoder needs.

    The factor is not charged: four bytes for a whole array.
    """

    streams: Sequence[bytes]
    scale: float = 1.0

    @property
    def size(self) -> int:
        """Bytes of all streams."""
        return sum(map(len, self.streams))


@dataclass(frozen=True)
class Sample:
    """Blocks to fit on and blocks to encode, in every form that a codec asks for."""

    train: Blocks
    held: Blocks

    @cached_property
    def mosaic_values(self) -> Array:
        """float32 [time, rows, columns, C]; 0 where missing."""
        return self.held.mosaic.lay(self.held.values)

    @cached_property
    def mosaic_valid(self) -> NDArray[np.bool_]:
        """bool, the shape of `mosaic_values`."""
        return self.held.mosaic.lay(self.held.valid)

    @cached_property
    def _filled(self) -> tuple[Array, float]:
        start = time.perf_counter()
        # Timed apart: filling is done once for all rates, but belongs to the encoding time of each.
        values = filled(self.mosaic_values, self.mosaic_valid)
        return values, time.perf_counter() - start

    @property
    def filled_mosaic(self) -> Array:
        """`mosaic_values` with missing values continued smoothly from around."""
        return self._filled[0]

    @property
    def fill_seconds(self) -> float:
        """What computing `filled_mosaic` took."""
        return self._filled[1]

    @cached_property
    def filled_blocks(self) -> Array:
        """`filled_mosaic` as blocks, float32 [N, T, Y, X, C]."""
        return self.held.mosaic.cut(self.filled_mosaic)


SettingT = TypeVar("SettingT", bound=Setting)


class RateCodec(ABC, Generic[SettingT]):
    """A codec of the report: one name, several rates.

    Attributes
    ----------
    name
        Its name in the report.
    family
        The name under which a missing package is reported, where several
        codecs share one; empty for `name`.
    on_mosaic
        Whether it encodes the mosaic [time, rows, columns, C] of all blocks, or
        the blocks [N, T, Y, X, C].
    fill
        Whether missing values are continued smoothly before encoding. They are
        0 otherwise.
    keep_best
        Whether points that another setting beats in bytes and in error are
        left out.
    """

    name: ClassVar[str]
    family: ClassVar[str] = ""
    on_mosaic: ClassVar[bool] = False
    fill: ClassVar[bool] = False
    keep_best: ClassVar[bool] = False

    def title(self, train: Blocks) -> str:
        """Return the name for the report where it depends on the data."""
        return self.name

    def missing(self) -> str | None:
        """Return why the codec cannot run on this machine, or None."""
        return None

    def obstacle(self, train: Blocks, held: Mosaic) -> str | None:
        """Return why the codec cannot be fitted on these blocks, or None."""
        return None

    @abstractmethod
    def settings(self, train: Blocks, values: Array) -> Sequence[SettingT]:
        """Return the rate settings to measure on `values`."""

    @abstractmethod
    def encode(self, values: Array, setting: SettingT) -> Encoded:
        """Encode float32 values."""

    @abstractmethod
    def decode(self, encoded: Encoded, setting: SettingT, shape: tuple[int, ...]) -> Array:
        """Return float32 values of that shape."""


def encode_and_decode(
    codec: RateCodec[SettingT], name: str, values: Array, setting: SettingT
) -> Coded:
    """Measure one codec at one setting."""
    start = time.perf_counter()
    encoded = codec.encode(values, setting)
    # Decoded from the streams alone and timed apart, so that a point is what a reader of them would
    # get.
    middle = time.perf_counter()
    guess = codec.decode(encoded, setting, values.shape)
    end = time.perf_counter()

    return Coded(
        name,
        setting.label,
        encoded.size,
        guess,
        middle - start,
        end - middle,
        setting.learned_bytes,
    )


def coded_points(codec: RateCodec[SettingT], sample: Sample) -> Iterator[Coded]:
    """Measure a codec at all its rates.

    Parameters
    ----------
    codec
        One for which `missing` and `obstacle` return None.
    sample
        Training and held-out blocks.

    Yields
    ------
    Coded
        A point a rate, with `guess` as blocks [N, T, Y, X, C].
    """
    if codec.on_mosaic:
        values = sample.filled_mosaic if codec.fill else sample.mosaic_values
        valid = sample.mosaic_valid
    else:
        values = sample.filled_blocks if codec.fill else sample.held.values
        valid = sample.held.valid

    name = codec.title(sample.train)
    # Functions and not points: a decoded array is as large as the blocks, and there may be 28
    # rates.
    makers = [
        partial(encode_and_decode, codec, name, values, setting)
        for setting in codec.settings(sample.train, values)
    ]
    points = front(makers, values, valid) if codec.keep_best else (make() for make in makers)

    for point in points:
        if codec.on_mosaic:
            yield replace(
                point,
                # Errors are counted over blocks for every codec, whatever layout it encoded.
                guess=sample.held.mosaic.cut(point.guess),
                encode_seconds=point.encode_seconds + (sample.fill_seconds if codec.fill else 0),
            )
        else:
            yield point


def front(
    makers: Sequence[Callable[[], Coded]], truth: Array, valid: NDArray[np.bool_]
) -> Iterator[Coded]:
    """Return the points that no other beats in bytes and in error, by bytes.

    Each maker is called once, and those of the points that remain once more, so
    that no two decoded arrays are in memory at a time.

    Parameters
    ----------
    makers
        Functions that measure a point each.
    truth, valid
        Values before encoding, and which of them count in the mean square
        error.
    """
    tried = []
    for index, make in enumerate(makers):
        point = make()
        difference = (point.guess - truth)[valid]
        # In float64, so that the order of two close points does not depend on rounding.
        error = float(np.square(difference, dtype=np.float64).mean())
        tried.append((point.bytes, error, index))

    least = np.inf
    # In the order of bytes, so that a point stays only if it errs less than all cheaper ones.
    for _, error, index in sorted(tried):
        if error < least:
            least = error
            yield makers[index]()
