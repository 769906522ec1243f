"""The images of a training run: the curve of losses and codes, and the sheet of one block.

The sheet shows truth, reconstruction and error of every feature. Matplotlib is imported when the
first one is drawn, so that processes that draw nothing do not load it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from warehouse.layouts.features import Feature

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curve", "draw_sheet"]

CURVES = {
    "loss": "0.55",
    "total": "C0",
    "cont": "C2",
    "cat": "C1",
    "canopy": "C4",
    "vq": "C3",
}
"""Colours of the loss terms."""

Array = NDArray[np.float32]


def draw_curve(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw loss terms (left), and held-out perplexity and usage of the codes (right), by epoch.

    Parameters
    ----------
    history
        A line for each epoch. Epochs without an evaluation have no held-out figures.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    for name, colour in CURVES.items():
        # A term without its kind of feature is 0 throughout, which a log axis cannot show.
        rows = [row for row in history if row.get(name, 0) > 0]
        if rows:
            label = "training total" if name == "loss" else f"held-out {name} {rows[-1][name]:.3g}"
            _draw_line(left, rows, name, color=colour, label=label, marker=".")
    left.set(xlabel="epoch", ylabel="loss (log)", title=title, yscale="log")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize="small")

    rows = [row for row in history if "perplexity" in row]
    levels = sorted({key for row in rows for key in row if key.startswith("perplexity")})
    for number, name in enumerate(levels):
        label = f"{name} {rows[-1][name]:.0f}"
        _draw_line(right, rows, name, color=f"C{number}", label=label, marker=".")
    right.set(xlabel="epoch", ylabel="held-out perplexity", ylim=(0, None))
    right.grid(alpha=0.3)

    share = right.twinx()
    _draw_line(share, rows, "usage", color="0.6", label="share of codes in use", linestyle=":")
    share.set(ylim=(0, 1.02), ylabel="share of first-level codes in use (dotted)")
    if levels:
        right.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def _draw_line(
    axis: Axes,
    rows: Sequence[Mapping[str, float]],
    name: str,
    *,
    color: str,
    label: str,
    marker: str = "",
    linestyle: str = "-",
) -> None:
    epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
    axis.plot(epochs, values, color=color, label=label, marker=marker, linestyle=linestyle)


def draw_sheet(
    truth: Array,
    guess: Array,
    valid: NDArray[np.bool_],
    features: Sequence[Feature],
    path: Path,
    *,
    dates: int = 3,
) -> None:
    """Draw one block as a PNG with a row for each feature.

    Each date has three columns: truth, reconstruction and error, blue where the reconstruction is
    lower and red where it is higher. Values that are not valid stay grey.

    Parameters
    ----------
    truth, guess
        float32 [T, Y, X, F], in physical units and codes.
    valid
        bool [T, Y, X, F].
    dates
        How many dates are shown, at most.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spread = np.linspace(0, len(truth) - 1, min(dates, len(truth))).round()
    times = sorted({int(time) for time in spread})

    # Margins are fixed in inches, so that labels fit for any number of features and dates.
    width, height = 1.15 * 3 * len(times) + 1.6, 1.15 * len(features) + 0.5
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(features), 3 * len(times), squeeze=False)
    figure.subplots_adjust(
        left=1.5 / width,
        right=1 - 0.1 / width,
        bottom=0.1 / height,
        top=1 - 0.4 / height,
        wspace=0.06,
        hspace=0.06,
    )

    for row, feature in enumerate(features):
        shown = np.where(valid[..., row], truth[..., row], np.nan)
        _draw_feature(axes[row], feature, shown, guess[..., row], times)

    for column, time in enumerate(times):
        titles = (f"truth, date {time}", "codes", "error")
        for axis, title in zip(axes[0, 3 * column : 3 * column + 3], titles, strict=True):
            axis.set_title(title, fontsize=8)
    figure.savefig(path)


def _draw_feature(
    axes: Sequence[Axes], feature: Feature, truth: Array, guess: Array, times: Sequence[int]
) -> None:
    """Draw one row of the sheet. truth is NaN where not valid."""
    known = truth[np.isfinite(truth)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if high <= low:
        high = low + 1.0

    # One scale for truth and reconstruction, and one for all errors of the row: with a scale for
    # each image a bad reconstruction would look like a good one.
    categorical = feature.kind == "categorical"
    colours = "tab20" if categorical else "viridis"
    span = 1.0 if categorical else (high - low) / 2

    for column, time in enumerate(times):
        error = guess[time] - truth[time]
        if categorical:
            error = np.where(np.isnan(error), np.nan, error != 0)
        images = (
            (truth[time], low, high, colours),
            (guess[time], low, high, colours),
            (error, -span, span, "RdBu_r"),
        )
        for axis, (image, least, most, colour) in zip(axes[3 * column :], images, strict=False):
            axis.imshow(image, vmin=least, vmax=most, cmap=colour, interpolation="nearest")
            axis.set(xticks=[], yticks=[], facecolor="0.7")

    label = f"{feature.name}\n{low:.3g} to {high:.3g}"
    axes[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
