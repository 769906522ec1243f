"""ZFP and SZ3: floating-point codecs with a bound on every value's error.

Both are optional packages. Layouts of 2, 3 and 4 dimensions and the predictors of SZ3 are all
tried, since none is best at every rate (docs/log.md); what another setting beats at no more bytes
is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqvae.rate.codecs.base import Array, Blocks, Encoded, RateCodec, Setting

__all__ = ["Sz3", "Zfp"]

# Beyond the range of a feature, because ZFP's errors are far below what it promises.
TOLERANCES = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
"""In ranges of a feature. ZFP promises no error above; on average it is far below."""

BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7)


@dataclass(frozen=True)
class Tolerance(Setting):
    """One tolerance in one layout.

    Parameters
    ----------
    layout
        2D, 3D or 4D.
    tolerance
        Greatest absolute error.
    """

    layout: str
    tolerance: float


@dataclass(frozen=True)
class Bound(Setting):
    """One error bound in one layout with one predictor.

    Parameters
    ----------
    layout
        2D or 4D.
    algorithm
        SZ3's name of the predictor.
    bound
        Greatest absolute error.
    """

    layout: str
    algorithm: str
    bound: float


class Zfp(RateCodec[Tolerance]):
    """ZFP at fixed accuracy.

    Fixed rate spends as many bits on a lake as on a town. Missing values are zeros and not a
    smooth continuation, because ZFP passes over blocks of zeros.
    """

    # Fixed rate was tried and left out: it spends as many bits on a lake as on a town, and in 2D it
    # ended the process at 0.05 bits a value (docs/log.md).
    name = "ZFP"
    on_mosaic = True
    keep_best = True

    def missing(self) -> str | None:
        return _missing("zfpy")

    def settings(self, train: Blocks, values: Array) -> Sequence[Tolerance]:
        return [
            Tolerance(f"{layout}, tolerance {tolerance:g}", 0, layout, tolerance)
            # Planes below each other lead above 0.8 bits, three and four axes below (docs/log.md).
            for layout in ("2D", "3D", "4D")
            for tolerance in TOLERANCES
        ]

    def encode(self, values: Array, setting: Tolerance) -> Encoded:
        import zfpy

        laid = _features_first(values, setting.layout)
        return Encoded([zfpy.compress_numpy(laid, tolerance=setting.tolerance)])

    def decode(self, encoded: Encoded, setting: Tolerance, shape: tuple[int, ...]) -> Array:
        import zfpy

        return _features_last(zfpy.decompress_numpy(encoded.streams[0]), shape)


class Sz3(RateCodec[Bound]):
    """SZ3 with an absolute error bound."""

    name = "SZ3"
    on_mosaic = True
    fill = True
    keep_best = True

    def missing(self) -> str | None:
        return _missing("pysz")

    def settings(self, train: Blocks, values: Array) -> Sequence[Bound]:
        # Lorenzo and regression leads under 0.2 bits a value, interpolation above (docs/log.md).
        predictors = (
            ("2D", "interpolation", "INTERP"),
            ("2D", "interpolation or Lorenzo", "INTERP_LORENZO"),
            ("2D", "Lorenzo and regression", "LORENZO_REG"),
            ("4D", "Lorenzo and regression", "LORENZO_REG"),
        )
        return [
            Bound(f"{layout}, {text}, bound {bound:g}", 0, layout, algorithm, bound)
            for layout, text, algorithm in predictors
            for bound in BOUNDS
        ]

    def encode(self, values: Array, setting: Bound) -> Encoded:
        import pysz

        laid = _features_first(values, setting.layout)
        config = pysz.szConfig(*laid.shape)
        config.errorBoundMode = pysz.szErrorBoundMode.ABS
        config.absErrorBound = setting.bound
        config.cmprAlgo = getattr(pysz.szAlgorithm, setting.algorithm)
        return Encoded([pysz.sz.compress(laid, config)[0].tobytes()])

    def decode(self, encoded: Encoded, setting: Bound, shape: tuple[int, ...]) -> Array:
        import pysz

        packed = np.frombuffer(encoded.streams[0], np.uint8)
        laid_shape = _layout_shape(shape, setting.layout)
        return _features_last(pysz.sz.decompress(packed, np.float32, laid_shape)[0], shape)


def _missing(package: str) -> str | None:
    if importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package} is not installed: pip install 'tensor-warehouse[codecs]'"


def _layout_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Return the shape in which a mosaic [time, rows, columns, C] is encoded.

    2D: planes below each other. 3D: a stack of planes. 4D: all axes.
    """
    dates, rows, columns, features = shape
    return {
        "2D": (features * dates * rows, columns),
        "3D": (features * dates, rows, columns),
        "4D": (features, dates, rows, columns),
    }[layout]


def _features_first(values: Array, layout: str) -> Array:
    moved = np.ascontiguousarray(values.transpose(3, 0, 1, 2))
    return moved.reshape(_layout_shape(values.shape, layout))


def _features_last(laid: Array, shape: tuple[int, ...]) -> Array:
    return laid.reshape(shape[3], *shape[:3]).transpose(1, 2, 3, 0)
