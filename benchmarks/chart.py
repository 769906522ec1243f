"""The rows as one picture.

Bars of medians with whiskers from min to max, grouped by colour, the two limits as lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LIMIT_LINES", "draw_chart", "ordered"]

COLOURS = {"limit": "#9aa5b1", "ours": "#1f7a4d", "peer": "#4a6fa5"}
LABELS = {"limit": "limit of the machine", "ours": "this loader", "peer": "other readers"}
LIMIT_LINES = ("lz4 decode", "row take")


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The timed rows, slowest first: matplotlib draws bars from below."""
    return sorted(
        (row for row in rows if row.get("median") is not None), key=lambda row: row["median"]
    )


def draw_chart(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG of rows {name, group, workers, median, min, max}, samples/s.

    Raises ValueError when there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = ordered(rows)
    if not shown:
        raise ValueError("no timed row to draw")
    figure = Figure(figsize=(11, 1.6 + 0.29 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    medians = [row["median"] for row in shown]
    whiskers = [
        [row["median"] - row["min"] for row in shown],
        [row["max"] - row["median"] for row in shown],
    ]
    axes.barh(
        range(len(shown)),
        medians,
        height=0.72,
        color=[COLOURS[row["group"]] for row in shown],
        xerr=whiskers,
        error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
    )
    top = max(row["max"] for row in shown)
    for at, row in enumerate(shown):
        axes.text(row["max"] + 0.008 * top, at, f"{row['median']:,.0f}", va="center", fontsize=8)
    for row in shown:
        if row["name"] in LIMIT_LINES:
            axes.axvline(row["median"], color="#7b8794", linestyle=":", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8.5)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0, 1.12 * top)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel(
        "samples/s: median, whiskers from slowest to fastest run; dotted: LZ4 decode and row take"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    groups = [group for group in COLOURS if any(row["group"] == group for row in shown)]
    axes.legend(
        handles=[Patch(color=COLOURS[group], label=LABELS[group]) for group in groups],
        loc="lower right",
        fontsize=8,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
