"""JPEG 2000, ZFP and SZ3 on mosaics of held-out blocks, each with the layout and mode that served
it best on NAIP (docs/log.md).

JPEG 2000 (Pillow's OpenJPEG, irreversible 9-7 wavelet, 16 bits): all dates and components below
each other in one codestream. One stream has one header, and its rate allocation cuts all components
where the error falls equally fast a byte: on NAIP worth 0.5 to 2 dB against a stream a component at
one error each. Components are features, principal components of features, or of features and dates.
ZFP (zfpy, fixed accuracy) and SZ3 (pysz, absolute error bound): layouts of 2, 3 and 4 dimensions
and the predictors of SZ3 are all tried, what another setting beats at no more bytes is dropped.
Both are optional, and what is not there is named with the reason. None of these streams can be
decoded by block, as the codes of a VQ-VAE can.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Coded", "absent_codecs", "front", "jpeg2000", "row_parts", "sz3", "zfp"]

Array = NDArray[np.float32]
QUALITIES = (14.0, 17.0, 20.0, 23.0, 26.0, 29.0, 32.0, 36.0)
TOLERANCES = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
"""Over features' ranges. ZFP promises no error above; on average it is far below."""
BOUNDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7)
STREAM_PIXELS = 1 << 26
"""Of one codestream: under the number from which Pillow takes a picture for an attack."""


@dataclass(frozen=True, slots=True)
class Coded:
    """One codec at one rate. guess: float32, the values decoded, in the shape of what was encoded.

    bytes: of everything that belongs to these values; apart: of what was learnt from training
    blocks, such as a basis.
    """

    codec: str
    setting: str
    bytes: int
    guess: Array = field(repr=False)
    encode_seconds: float
    decode_seconds: float
    apart: int = 0


def absent_codecs() -> dict[str, str]:
    """Codecs that cannot be measured here, with the reason."""
    from PIL import features

    out = {}
    for codec, module in (("ZFP", "zfpy"), ("SZ3", "pysz")):
        if importlib.util.find_spec(module) is None:
            out[codec] = (
                f"the package {module} is not installed: pip install 'tensor-warehouse[codecs]'"
            )
    if not features.check_codec("jpg_2000"):
        out["JPEG 2000"] = "this Pillow was built without OpenJPEG"
    return out


def front(
    makers: Sequence[Callable[[], Coded]], truth: Array, valid: NDArray[np.bool_]
) -> Iterator[Coded]:
    """The points that no other beats in bytes and in mean square error over valid values, by bytes.

    Each maker is called once, those of the points kept once more: no two decoded arrays are held at
    a time.
    """
    tried = []
    for at, make in enumerate(makers):
        point = make()
        tried.append(
            (
                point.bytes,
                float(np.square((point.guess - truth)[valid], dtype=np.float64).mean()),
                at,
            )
        )
    least = np.inf
    for _, error, at in sorted(tried):
        if error < least:
            least = error
            yield makers[at]()


def row_parts(planes: NDArray[Any], axis: int) -> list[NDArray[Any]]:
    """Consecutive parts along the axis of rows, each of about STREAM_PIXELS at most.

    A picture each.
    """
    return np.array_split(
        planes, min(planes.shape[axis], -(-planes.size // STREAM_PIXELS)), axis=axis
    )


def jpeg2000(name: str, laid: Array, basis: Array, *, dates: bool = False) -> Iterator[Coded]:
    """laid: [time, rows, columns, C]. basis: orthonormal [C, C].

    With `dates` [time * C, time * C], over dates and features at once.
    """
    time_steps, rows, columns, count = laid.shape

    def planes_of(values: Array) -> Array:
        """[components, rows, columns], or with a plane a date and component."""
        if dates:
            joint = values.transpose(1, 2, 0, 3).reshape(rows, columns, -1) @ basis
            return np.ascontiguousarray(joint.transpose(2, 0, 1))
        return np.ascontiguousarray((values @ basis).transpose(3, 0, 1, 2)).reshape(
            -1, rows, columns
        )

    def values_of(planes: Array) -> Array:
        if dates:
            return (
                (planes.transpose(1, 2, 0) @ basis.T)
                .reshape(rows, columns, time_steps, count)
                .transpose(2, 0, 1, 3)
            )
        return planes.reshape(count, time_steps, rows, columns).transpose(1, 2, 3, 0) @ basis.T

    apart = 0 if np.array_equal(basis, np.eye(len(basis))) else basis.nbytes
    for quality in QUALITIES:
        start = time.perf_counter()
        planes = planes_of(laid)
        scale = 32_767 / max(float(np.abs(planes).max()), 1e-6)
        parts = row_parts(planes, axis=1)
        streams = [_encode_j2k(part, scale, quality) for part in parts]
        middle = time.perf_counter()
        back = np.concatenate(
            [
                _decode_j2k(stream, scale, part.shape)
                for stream, part in zip(streams, parts, strict=True)
            ],
            axis=1,
        )
        guess = values_of(back).astype(np.float32)
        size = sum(map(len, streams))
        yield Coded(
            name,
            f"{quality:g} dB",
            size,
            guess,
            middle - start,
            time.perf_counter() - middle,
            apart,
        )


def _encode_j2k(planes: Array, scale: float, quality: float) -> bytes:
    """planes: [n, rows, columns], to a mean square error of 10^(-quality / 10)."""
    from PIL import Image

    # OpenJPEG's fixed quality is against the peak of the 16 bits; 0 and less would mean none lost.
    decibel = max(1.0, float(quality + 20 * np.log10(65_535 / scale)))
    stack = (
        (np.round(planes * scale) + 32_768)
        .clip(0, 65_535)
        .astype(np.uint16)
        .reshape(-1, planes.shape[2])
    )
    buffer = io.BytesIO()
    Image.fromarray(stack).save(
        buffer,
        "JPEG2000",
        irreversible=True,
        no_jp2=True,
        quality_mode="dB",
        quality_layers=[decibel],
    )
    return buffer.getvalue()


def _decode_j2k(stream: bytes, scale: float, shape: Sequence[int]) -> Array:
    from PIL import Image

    with Image.open(io.BytesIO(stream)) as picture:
        out: Array = (
            (np.asarray(picture).astype(np.float32) - 32_768) / np.float32(scale)
        ).reshape(shape)
    return out


def _layouts(laid: Array) -> dict[str, tuple[int, ...]]:
    """Shapes to code [C, time, rows, columns] in.

    Planes below each other, planes as a stack, all axes.
    """
    time_steps, rows, columns, count = laid.shape
    return {
        "2D": (count * time_steps * rows, columns),
        "3D": (count * time_steps, rows, columns),
        "4D": (count, time_steps, rows, columns),
    }


def _coded(
    codec: str,
    setting: str,
    laid: Array,
    shape: Sequence[int],
    encode: Callable[[Array], Any],
    decode: Callable[[Any], Array],
) -> Coded:
    start = time.perf_counter()
    packed = encode(np.ascontiguousarray(laid.transpose(3, 0, 1, 2)).reshape(shape))
    middle = time.perf_counter()
    back = decode(packed).reshape(laid.shape[3], *laid.shape[:3]).transpose(1, 2, 3, 0)
    return Coded(codec, setting, len(packed), back, middle - start, time.perf_counter() - middle)


def zfp(laid: Array, valid: NDArray[np.bool_]) -> Iterator[Coded]:
    """laid, valid: [time, rows, columns, C].

    Fixed accuracy: fixed rate spends as much on a lake as on a town.
    """
    import zfpy

    def make(layout: str, shape: tuple[int, ...], tolerance: float) -> Coded:
        setting = f"{layout}, tolerance {tolerance:g}"
        return _coded(
            "ZFP",
            setting,
            laid,
            shape,
            lambda value: zfpy.compress_numpy(value, tolerance=tolerance),
            zfpy.decompress_numpy,
        )

    shapes = _layouts(laid)
    return front(
        [
            partial(make, layout, shapes[layout], tolerance)
            for layout in shapes
            for tolerance in TOLERANCES
        ],
        laid,
        valid,
    )


def sz3(laid: Array, valid: NDArray[np.bool_]) -> Iterator[Coded]:
    """laid, valid: [time, rows, columns, C]. No value is further off than the bound."""
    import pysz

    kinds = pysz.szAlgorithm
    ways = [
        ("2D", "interpolation", kinds.INTERP),
        ("2D", "interpolation or Lorenzo", kinds.INTERP_LORENZO),
        ("2D", "Lorenzo and regression", kinds.LORENZO_REG),
        ("4D", "Lorenzo and regression", kinds.LORENZO_REG),
    ]

    def make(layout: str, text: str, algorithm: int, bound: float) -> Coded:
        shape = _layouts(laid)[layout]
        config = pysz.szConfig(*shape)
        config.errorBoundMode, config.absErrorBound, config.cmprAlgo = (
            pysz.szErrorBoundMode.ABS,
            bound,
            algorithm,
        )
        return _coded(
            "SZ3",
            f"{layout}, {text}, bound {bound:g}",
            laid,
            shape,
            lambda value: pysz.sz.compress(value, config)[0],
            lambda packed: pysz.sz.decompress(packed, np.float32, shape)[0],
        )

    return front([partial(make, *way, bound) for way in ways for bound in BOUNDS], laid, valid)
