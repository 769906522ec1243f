"""The choice of a quantizer by its name in the settings."""

from __future__ import annotations

from vqvae.quantizers.base import Quantizer
from vqvae.quantizers.codebook import CodebookRules
from vqvae.quantizers.ema import EmaQuantizer
from vqvae.quantizers.fsq import FsqQuantizer

__all__ = ["make_quantizer"]


def make_quantizer(kind: str, size: int, dim: int, levels: int, rules: CodebookRules) -> Quantizer:
    """Make a quantizer.

    Parameters
    ----------
    kind
        "ema" for codebooks that follow the encoder, "fsq" for a fixed grid.
    size, dim, levels
        Codes a level, numbers a vector (for FSQ it follows from `size`), and
        residual levels.
    rules
        Of the codebooks; FSQ has none.
    """
    if kind == "ema":
        return EmaQuantizer(size, dim, levels, rules)
    # A grid has as many dimensions as its size has factors, so `dim` has no say.
    return FsqQuantizer(size, levels)
