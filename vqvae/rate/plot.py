"""The curves of a rate-distortion report.

PSNR over bits a continuous value, on two scales of PSNR side by side.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from warehouse.format import durable

__all__ = ["draw"]

OURS = "VQ-VAE"
SCALES = (
    ("psnr", "PSNR over the features' own ranges, dB"),
    ("psnr_255", "PSNR of byte features over 255, dB"),
)
MOST_BITS, LEAST_DB, MOST_DB = 4.0, 14.0, 44.0
"""Beyond, curves only go on, and codecs of 5 bits a value would squeeze those of 0.05."""


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Raises OSError. The right half is left out where no feature is a byte."""
    from matplotlib.figure import Figure

    scales = [
        scale for scale in SCALES if any(point.get(scale[0]) is not None for point in points)
    ] or [SCALES[0]]
    figure = Figure(figsize=(3 + 6 * len(scales), 7.2), layout="constrained")
    names = sorted({point["codec"] for point in points}, key=lambda name: (name != OURS, name))
    for number, (key, text) in enumerate(scales, 1):
        axes = figure.add_subplot(1, len(scales), number)
        for at, name in enumerate(names):
            mine = (
                point
                for point in points
                if point["codec"] == name and point["bytes"] and point.get(key) is not None
            )
            curve = sorted((point["bits_per_continuous"], point[key]) for point in mine)
            if name == OURS:
                # Fewer levels and dearer bits are two ways to the same rates; the curve is of the
                # better.
                curve = [
                    (rate, height)
                    for at_rate, (rate, height) in enumerate(curve)
                    if all(height > each for _, each in curve[:at_rate])
                ]
            style: dict[str, Any] = (
                {"color": "black", "linewidth": 3, "zorder": 5}
                if name == OURS
                else {"color": f"C{(at - 1) % 10}"}
            )
            dash = "-" if at <= 10 else "--"
            if curve:
                axes.plot(
                    *zip(*curve, strict=True), dash, marker="o", markersize=4, label=name, **style
                )
        axes.set_xscale("log")
        axes.set_xlim(right=MOST_BITS)
        axes.set_ylim(LEAST_DB, MOST_DB)
        axes.set_xlabel("bits a valid continuous value, every byte counted")
        axes.set_ylabel(text)
        axes.grid(which="both", alpha=0.25)
        if number == 1:
            handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    durable.write_bytes(path, buffer.getvalue())
