"""What a rate-distortion report consists of, as it stands in report.json."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["OURS", "EqualRate", "Packing", "PackingResult", "RatePoint", "RateReport"]

OURS = "VQ-VAE"
"""Name of the codes among the codecs."""


# Dictionaries and not classes: they are written to report.json as they are. Not total, because
# rates are added once all points of a report are measured.
class RatePoint(TypedDict, total=False):
    """One codec at one setting.

    Attributes
    ----------
    levels, rate_weight, paths, bytes_by_array, ideal_codes_bytes, fixed_codes_bytes
        Of the codes only.
    all_features
        Whether categories and canopy are encoded too.
    bytes
        Everything that belongs to the values.
    bytes_apart
        What was learned from training blocks.
    psnr, psnr_255
        In dB; None without values to measure.
    rmse
        By feature, in physical units.
    accuracy, miou, canopy_mae
        Means over the categorical features and over the canopies; absent in a cube without any.
    """

    codec: str
    setting: str
    levels: int
    rate_weight: float
    paths: int
    all_features: bool
    bytes: int
    bytes_apart: int
    bytes_by_array: dict[str, int]
    ideal_codes_bytes: float
    fixed_codes_bytes: float
    psnr: float | None
    psnr_255: float | None
    rmse: dict[str, float]
    accuracy: float
    miou: float
    canopy_mae: float
    encode_seconds: float
    decode_seconds: float
    bits_per_value: float
    bits_per_continuous: float


class EqualRate(TypedDict):
    """PSNR of other codecs at the rate of one point of the codes; None where not reached.

    Attributes
    ----------
    others
        At `bits_per_continuous`.
    others_per_value
        At `bits_per_value`.
    """

    setting: str
    bits_per_value: float
    bits_per_continuous: float
    psnr: float | None
    others: dict[str, float | None]
    others_per_value: dict[str, float | None]


class Packing(TypedDict, total=False):
    """One lossless packing of a categorical feature. Rates are over its valid values."""

    bytes: int
    bits_per_value: float
    encode_seconds: float
    decode_seconds: float


class PackingResult(TypedDict):
    """All packings of a categorical feature, and the name of the smallest."""

    best: str
    bits_per_value: float
    packings: dict[str, Packing]


class RateReport(TypedDict):
    """The whole of report.json."""

    split: str
    blocks: int
    continuous_values: int
    values: int
    ranges: dict[str, float]
    byte_features: list[str]
    points: list[RatePoint]
    at_equal_rate: list[EqualRate]
    absent: dict[str, str]
    few_rates: dict[str, str]
    seams: dict[str, dict[str, float]]
    lossless_categories: dict[str, PackingResult]
    checkpoint: str
    codec_bytes: dict[str, int]
    numbering_bytes: int
    threads: int
