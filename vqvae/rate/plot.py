"""The curves of a rate-distortion report: PSNR over bits a continuous value, on two scales."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vqvae.rate.points import OURS, RatePoint
from warehouse.format import durable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

Scale = Literal["psnr", "psnr_255"]
SCALES: tuple[tuple[Scale, str], ...] = (
    ("psnr", "PSNR over the features' own ranges, dB"),
    ("psnr_255", "PSNR of byte features over 255, dB"),
)

MOST_BITS, LEAST_DB, MOST_DB = 4.0, 14.0, 44.0
"""Beyond these, curves only continue, and codecs of 5 bits a value would squeeze those of 0.05."""


def draw(points: Sequence[RatePoint], path: Path) -> None:
    """Write the curves as a PNG.

    The right half is left out where no feature is a byte.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    scales = [(key, text) for key, text in SCALES if any(_has(point, key) for point in points)] or [
        SCALES[0]
    ]
    # The codes first, so that they are black and lie on top.
    names = sorted({point["codec"] for point in points}, key=lambda name: (name != OURS, name))

    figure = Figure(figsize=(3 + 6 * len(scales), 7.2), layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    for axes, (key, text) in zip(panels, scales, strict=True):
        for number, name in enumerate(names):
            curve = _curve(points, name, key)
            if curve:
                rates, heights = zip(*curve, strict=True)
                axes.plot(rates, heights, label=name, **_style(name, number))
        _label(axes, text)

    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    durable.write_bytes(path, buffer.getvalue())


def _has(point: RatePoint, key: Scale) -> bool:
    return point.get(key) is not None


def _curve(points: Sequence[RatePoint], name: str, key: Scale) -> list[tuple[float, float]]:
    """Return (bits, dB) of one codec, by rate."""
    found = []
    for point in points:
        height = point.get(key)
        if point["codec"] == name and point["bytes"] and height is not None:
            found.append((point["bits_per_continuous"], height))
    curve = sorted(found)

    if name != OURS:
        return curve
    # Fewer levels and dearer bits are two ways to the same rates; the curve is of the better.
    best: list[tuple[float, float]] = []
    for rate, height in curve:
        if not best or height > best[-1][1]:
            best.append((rate, height))
    return best


def _style(name: str, number: int) -> dict[str, Any]:
    style: dict[str, Any] = {"marker": "o", "markersize": 4}
    if name == OURS:
        return style | {"color": "black", "linewidth": 3, "zorder": 5}
    # Matplotlib has ten colours; dashes tell the second ten apart.
    dash = "-" if number <= 10 else "--"
    return style | {"color": f"C{(number - 1) % 10}", "linestyle": dash}


def _label(axes: Axes, text: str) -> None:
    axes.set_xscale("log")
    axes.set_xlim(right=MOST_BITS)
    axes.set_ylim(LEAST_DB, MOST_DB)
    axes.set_xlabel("bits a valid continuous value, every byte counted")
    axes.set_ylabel(text)
    axes.grid(which="both", alpha=0.25)
