"""The codecs of the rate-distortion report.

To add one, write a subclass of `RateCodec` in a file of this folder and add it to CODECS.
"""

from __future__ import annotations

from typing import Any

from vqvae.rate.codecs.base import RateCodec
from vqvae.rate.codecs.error_bounded import Sz3, Zfp
from vqvae.rate.codecs.jpeg2000 import Jpeg2000, Jpeg2000OverDates, Jpeg2000OverFeatures
from vqvae.rate.codecs.pca import OneStepPca, PatchPca, PixelPca
from vqvae.rate.codecs.rounding import BitRounding, Float16, Int8

__all__ = ["CODECS"]

# A tuple and not a decorator that registers: the order of the report is visible in one place.
CODECS: tuple[RateCodec[Any], ...] = (
    Jpeg2000(),
    Jpeg2000OverFeatures(),
    Jpeg2000OverDates(),
    PixelPca(),
    PatchPca(),
    OneStepPca(),
    Zfp(),
    Sz3(),
    Float16(),
    Int8(),
    BitRounding(),
)
"""In the order in which they are measured and listed."""
