"""What the points of a report say as curves: PSNR at equal rates, and curves of too few rates."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np

from vqvae.rate.points import OURS, EqualRate, RatePoint

__all__ = ["at_equal_rate", "few_rates"]

# Interpolating between fewer would show mostly the interpolation.
FEWEST_RATES = 5


def at_equal_rate(points: list[RatePoint]) -> list[EqualRate]:
    """Return every other codec's PSNR at the rates of the codes.

    Parameters
    ----------
    points
        All points of a report.

    Returns
    -------
    list of EqualRate
        One for each point of the codes that has a PSNR; values are interpolated
        along log(rate).
    """
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for point in points:
        psnr = point["psnr"]
        if point["codec"] != OURS and psnr is not None:
            curves[point["codec"]].append((point["bits_per_continuous"], psnr))

    def psnr_at(rate: float) -> dict[str, float | None]:
        return {name: _interpolated(curve, rate) for name, curve in curves.items()}

    return [
        {
            "setting": point["setting"],
            "bits_per_value": point["bits_per_value"],
            "bits_per_continuous": point["bits_per_continuous"],
            "psnr": point["psnr"],
            # At both rates, so that nothing is hidden: the codes also hold categories and canopy.
            "others": psnr_at(point["bits_per_continuous"]),
            "others_per_value": psnr_at(point["bits_per_value"]),
        }
        for point in points
        if point["codec"] == OURS and point["psnr"] is not None
    ]


def _interpolated(curve: list[tuple[float, float]], rate: float) -> float | None:
    """Return the PSNR at a rate, or None outside the curve: extrapolating would invent a result."""
    rates, decibels = zip(*sorted(curve), strict=True)
    # Extrapolating would invent a result.
    if not rates[0] <= rate <= rates[-1]:
        return None
    # Along log(rate), as the curves are drawn.
    return float(np.interp(np.log(rate), np.log(rates), decibels))


def few_rates(points: list[RatePoint]) -> dict[str, str]:
    """Return the codecs with fewer than five rates, and why."""
    counts = Counter(point["codec"] for point in points)
    why = "other settings do not apply, or need more bytes and err more"
    return {name: f"{count} rates; {why}" for name, count in counts.items() if count < FEWEST_RATES}
