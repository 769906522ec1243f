"""Pictures of a run.

The curve of losses and codes, and the sheet of truth, reconstruction and error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.layouts.features import Feature

__all__ = ["draw_curve", "draw_sheet"]

Array = NDArray[np.float32]


def draw_curve(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training and held-out loss terms (left), held-out perplexity and usage (right) by epoch.
    history: one dict an epoch.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, colour in (
        ("loss", "0.55"),
        ("total", "C0"),
        ("cont", "C2"),
        ("cat", "C1"),
        ("canopy", "C4"),
        ("vq", "C3"),
    ):
        rows = [row for row in history if row.get(name, 0) > 0]
        if rows:
            label = "training total" if name == "loss" else f"held-out {name} {rows[-1][name]:.3g}"
            left.plot(
                [row["epoch"] for row in rows],
                [row[name] for row in rows],
                color=colour,
                label=label,
                marker=".",
            )
    left.set(xlabel="epoch", ylabel="loss (log)", title=title, yscale="log")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize="small")
    rows = [row for row in history if "perplexity" in row]
    levels = sorted({key for row in rows for key in row if key.startswith("perplexity")})
    for place, name in enumerate(levels):
        right.plot(
            [row["epoch"] for row in rows],
            [row[name] for row in rows],
            color=f"C{place}",
            label=f"{name} {rows[-1][name]:.0f}",
            marker=".",
        )
    share = right.twinx()
    share.plot(
        [row["epoch"] for row in rows],
        [row["usage"] for row in rows],
        color="0.6",
        linestyle=":",
        label="share of codes in use",
    )
    share.set(ylim=(0, 1.02), ylabel="share of first-level codes in use (dotted)")
    right.set(xlabel="epoch", ylabel="held-out perplexity", ylim=(0, None))
    right.grid(alpha=0.3)
    if levels:
        right.legend(frameon=False, fontsize="small")
    figure.savefig(path)


def draw_sheet(
    truth: Array,
    guess: Array,
    valid: NDArray[np.bool_],
    features: Sequence[Feature],
    path: Path,
    *,
    dates: int = 3,
) -> None:
    """One block as a PNG: a row a feature; for each of up to `dates` dates truth, reconstruction,
    error (blue below, red above).

    truth, guess: float32 [T, Y, X, F] in physical units and codes; valid: bool. What is not valid
    stays grey. Truth and reconstruction of a row share one scale, which its label names; so do its
    errors, whose scale is half the span of the truth.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = sorted(
        {int(at) for at in np.linspace(0, len(truth) - 1, min(dates, len(truth))).round()}
    )
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
        known = shown[np.isfinite(shown)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        high = high if high > low else low + 1.0
        kind = feature.kind == "categorical"
        colours = "tab20" if kind else "viridis"
        for place, at in enumerate(times):
            error = np.where(np.isnan(shown[at]), np.nan, guess[at, ..., row] - truth[at, ..., row])
            error = np.where(np.isnan(error), np.nan, error != 0) if kind else error
            span = 1.0 if kind else (high - low) / 2
            for column, (image, bounds, colour) in enumerate(
                (
                    (shown[at], (low, high), colours),
                    (guess[at, ..., row], (low, high), colours),
                    (error, (-span, span), "RdBu_r"),
                )
            ):
                axis = axes[row, 3 * place + column]
                axis.imshow(
                    image, vmin=bounds[0], vmax=bounds[1], cmap=colour, interpolation="nearest"
                )
                axis.set(xticks=[], yticks=[], facecolor="0.7")
                if row == 0:
                    axis.set_title(
                        ("truth", "codes", "error")[column]
                        + (f", date {at}" if column == 0 else ""),
                        fontsize=8,
                    )
        axes[row, 0].set_ylabel(
            f"{feature.name}\n{low:.3g} to {high:.3g}",
            fontsize=7,
            rotation=0,
            ha="right",
            va="center",
        )
    figure.savefig(path)
