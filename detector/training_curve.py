"""The training curve of a detector as a PNG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["draw_curve"]


def draw_curve(history: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Write a PNG of the training loss (left axis) and the held-out metrics (right axis) by epoch.

    Parameters
    ----------
    history
        One entry an epoch, as the training loop keeps it: `epoch` and `loss`, and after an
        evaluation the metrics. An interrupted epoch has a fraction for its number.
    path
        File to write.
    title
        Title of the figure.
    """
    # Not pyplot, which keeps every figure in a global list and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot(
        [row["epoch"] for row in history],
        [row["loss"] for row in history],
        color="0.55",
        label="training loss",
        marker=".",
    )

    # The loss falls by orders of magnitude in the first epochs.
    left.set(xlabel="epoch", ylabel="training loss (log)", title=title, yscale="log")
    left.grid(alpha=0.3)

    right = left.twinx()
    for name, colour in (("ap50", "C1"), ("map50", "C2"), ("ap", "C0"), ("mean_iou", "C3")):
        rows = [row for row in history if name in row]
        if rows:
            right.plot(
                [row["epoch"] for row in rows],
                [row[name] for row in rows],
                color=colour,
                label=f"{name} {rows[-1][name]:.3f}",
                marker=".",
            )

    right.set(ylabel="held-out metric", ylim=(0, 1))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    labels = [*left.get_legend_handles_labels()[1], *right.get_legend_handles_labels()[1]]

    # Two axes have two legends: one below the axes covers no curve.
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
