"""Statistics of a cube's features, of each stored chunk and of all of them together.

`block_facts` runs in a build worker on one decoded stored chunk and returns JSON for its marker;
`merge_features` combines the markers in the order of the chunks, so that the feature table is the
same for any number of workers. Means and squared deviations are combined by the pairwise update of
Chan, Golub and LeVeque (1979), in which no large sums cancel. Given up: quantiles, which cannot be
combined from parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.layouts.cube.geometry import CubeChunking
from warehouse.layouts.features import Feature

__all__ = ["block_facts", "merge_features", "valid_by_date"]


def block_facts(
    data: NDArray[np.float32], train: NDArray[np.bool_], origin_t: int, features: Sequence[Feature]
) -> dict[str, Any]:
    """Return facts of one stored chunk, as JSON.

    Parameters
    ----------
    data
        Values, float32 [time, y, x, feature], NaN where missing.
    train
        Voxels that the statistics are over, bool [time, y, x].
    origin_t
        Number in the cube of the chunk's first date.

    Returns
    -------
    dict
        `features`: moments, range and class counts of each; `voxels`: how many of `train` are set;
        `dates`: for each date of the chunk, how many values of time-varying features are present.
    """
    table = []
    for at, feature in enumerate(features):
        moments = (0, 0.0, 0.0)
        least, most, counts = math.inf, -math.inf, np.zeros(len(feature.codes), np.int64)
        # Date by date: a stored chunk is up to 128 MiB, and its copies in float64 would be several
        # times as large.
        for date in range(data.shape[0]):
            values = data[date, :, :, at][train[date]]
            values = values[~np.isnan(values)]
            if not values.size:
                continue
            if feature.kind == "categorical":
                # Codes are small integers, which float32 holds exactly.
                counts += np.array([np.count_nonzero(values == code) for code in feature.codes])

            exact = values.astype(np.float64)
            mean = float(exact.mean())
            moments = _combine(moments, (values.size, mean, float(np.square(exact - mean).sum())))
            least, most = min(least, float(values.min())), max(most, float(values.max()))
        table.append(
            {
                "moments": list(moments),
                "range": [least, most] if moments[0] else None,
                "counts": counts.tolist(),
            }
        )

    # A static feature is repeated along time: its values would hide that a date has none.
    moving = [at for at, feature in enumerate(features) if not feature.static]
    present = [
        int(np.count_nonzero(~np.isnan(data[date][..., moving]))) for date in range(data.shape[0])
    ]
    return {
        "features": table,
        "voxels": int(np.count_nonzero(train)),
        "origin_t": origin_t,
        "dates": present,
    }


def _combine(
    one: tuple[int, float, float], other: tuple[int, float, float]
) -> tuple[int, float, float]:
    """(count, mean, sum of squared deviations) of two sets together."""
    if not one[0] or not other[0]:
        return other if other[0] else one

    count, step = one[0] + other[0], other[1] - one[1]
    return (
        count,
        one[1] + step * other[0] / count,
        one[2] + other[2] + step * step * one[0] * other[0] / count,
    )


def merge_features(
    features: Sequence[Feature], facts: Sequence[Mapping[str, Any]]
) -> tuple[Feature, ...]:
    """Return the features with their statistics over valid training voxels.

    Parameters
    ----------
    facts
        What `block_facts` returned for each stored chunk, in the order of the chunks: rounding
        depends on the order, and the table is part of a version's bytes.
    """
    voxels = sum(each["voxels"] for each in facts)
    return tuple(
        _merge(feature, [each["features"][at] for each in facts], voxels)
        for at, feature in enumerate(features)
    )


def _merge(feature: Feature, parts: list[dict[str, Any]], voxels: int) -> Feature:
    moments = (0, 0.0, 0.0)
    for part in parts:
        moments = _combine(
            moments, (int(part["moments"][0]), part["moments"][1], part["moments"][2])
        )
    count = moments[0]
    share = count / voxels if voxels else 0.0
    if feature.kind == "categorical":
        counts = tuple(
            sum(column) for column in zip(*(part["counts"] for part in parts), strict=True)
        )
        return replace(feature, class_counts=counts, valid_share=share)
    if not count:
        return replace(feature, valid_share=share)
    ranges = [part["range"] for part in parts if part["range"]]
    return replace(
        feature,
        mean=moments[1],
        std=math.sqrt(moments[2] / count),
        minimum=min(low for low, _ in ranges),
        maximum=max(high for _, high in ranges),
        valid_share=share,
    )


def valid_by_date(layout: CubeChunking, facts: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
    """Return how many values of time-varying features are present at each date, int64 [time]."""
    total = np.zeros(layout.shape[0], np.int64)
    for each in facts:
        # The last stored chunk may reach beyond the last date.
        dates = each["dates"][: layout.shape[0] - each["origin_t"]]
        total[each["origin_t"] : each["origin_t"] + len(dates)] += dates
    return total
