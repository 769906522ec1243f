"""Indices: features that are computed from others instead of being read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ingest.rasters.resample import Plane
from ingest.rasters.settings import RasterFeature

__all__ = ["compute"]

NDVI_BARE, NDVI_SPAN = np.float32(0.2), np.float32(0.6)
"""NDVI of bare ground, and what is added to it at full cover."""


def compute(feature: RasterFeature, inputs: Mapping[str, Plane]) -> Plane:
    """Compute an index from warped values.

    Parameters
    ----------
    feature
        The feature, whose `index` is not None.
    inputs
        The values of each role that the index needs, all of one shape.

    Returns
    -------
    NDArray
        float32; NaN where an input is missing, or where the index is not defined.

    Notes
    -----
    ndvi = (nir - red) / (nir + red), after Rouse et al. (1974). ndwi = (green - nir) / (green +
    nir), after McFeeters (1996). cover = 100 clip((ndvi - 0.2) / 0.6, 0, 1), a percentage. classes
    gives the code of the interval between `breaks` in which a value lies, lower ends included.
    """
    if feature.index == "classes":
        return _classes(feature, inputs["source"])
    if feature.index == "ndwi":
        return _normalised_difference(inputs["green"], inputs["nir"])
    ndvi = _normalised_difference(inputs["nir"], inputs["red"])
    if feature.index == "ndvi":
        return ndvi
    share: Plane = np.clip((ndvi - NDVI_BARE) / NDVI_SPAN, 0, 1)
    return share * np.float32(100)


def _normalised_difference(high: Plane, low: Plane) -> Plane:
    total = high + low
    # Both bands are zero in the dark and in padding: no value, rather than a division by zero.
    undefined = np.full_like(total, np.nan)
    ratio: Plane = np.divide(high - low, total, out=undefined, where=total != 0)
    return ratio


def _classes(feature: RasterFeature, values: Plane) -> Plane:
    breaks = np.array(feature.breaks, np.float32)
    codes = np.array(feature.codes, np.float32)
    # NaN sorts above every number, so it would become the last class.
    intervals = np.searchsorted(breaks, np.nan_to_num(values), side="right")
    return np.where(np.isnan(values), np.float32(np.nan), codes[intervals])
