"""Seams: whether a reconstruction steps where inner chunks meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vqvae.rate.distortion import feature_ranges
from vqvae.rate.mosaic import Mosaic
from warehouse.layouts.features import Feature

__all__ = ["seam_steps"]

Values = NDArray[np.float32]


def seam_steps(
    mosaic: Mosaic,
    data: Values,
    guess: Values,
    valid: NDArray[np.bool_],
    features: Sequence[Feature],
) -> dict[str, dict[str, float]]:
    """Measure the step of the reconstruction error between neighbouring voxels.

    Parameters
    ----------
    mosaic
        Where the blocks lie.
    data, guess, valid
        float32, float32 and bool [N, T, Y, X, F], in physical units.
    features
        The cube's features; continuous ones count, over their ranges.

    Returns
    -------
    dict
        For each axis that has both: `border`, the mean absolute step across
        inner chunks, which are decoded without knowing each other; `inside`,
        the one within; and `ratio`, which is 1 without seams.
    """
    some = [index for index, feature in enumerate(features) if feature.kind == "continuous"]
    ranges = feature_ranges(features)[some].astype(np.float32)
    scaled = (guess[..., some] - data[..., some]) / ranges
    # NaN where no block lies or a value is missing, so that no step is taken across either.
    error = mosaic.lay(np.where(valid[..., some], scaled, np.nan).astype(np.float32), np.nan)

    found = {}
    for axis, name in enumerate(("time", "y", "x")):
        step = np.abs(np.diff(error, axis=axis))
        position = np.arange(1, error.shape[axis])
        border = position % mosaic.inner[axis] == 0
        if axis == 1:
            # Rows of different label blocks are not neighbours in the cube.
            same_block = position % mosaic.block_rows != 0
            step, border = step[:, same_block], border[same_block]

        across = _finite_mean(step.compress(border, axis=axis))
        inside = _finite_mean(step.compress(~border, axis=axis))
        if across is not None and inside:
            found[name] = {"border": across, "inside": inside, "ratio": across / inside}
    return found


def _finite_mean(values: Values) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None
