"""How good a classifier's probabilities are.

Accuracy, macro F1, AUROC, calibration error, confusion matrix. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.training.confusion import ConfusionMatrix

__all__ = [
    "auroc",
    "calibration_error",
    "classification_metrics",
    "draw_confusion",
]

BINS = 15


def classification_metrics(
    probability: NDArray[np.floating], target: NDArray[np.integer]
) -> dict[str, float]:
    """probability: [n, C], rows sum to 1; target: [n] in 0..C-1. Keys accuracy, macro_f1, auroc,
    ece, all in [0, 1].

    auroc is the mean over classes that have both kinds of samples, and left out when none has.
    """
    matrix = ConfusionMatrix.of(target, probability.argmax(axis=1), probability.shape[1])
    out = {
        "accuracy": matrix.accuracy,
        "macro_f1": matrix.macro_f1,
        "ece": calibration_error(probability, target),
    }
    areas = [
        auroc(probability[:, at], target == at)
        for at in range(probability.shape[1])
        if 0 < (target == at).sum() < len(target)
    ]
    return out | ({"auroc": float(np.mean(areas))} if areas else {})


def auroc(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve.

    The chance that a positive scores above a negative, ties counting half (Mann-Whitney U).
    """
    values, places, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[places]  # mean rank of each tie, from 1
    assert len(values)
    ones = int(positive.sum())
    zeros = len(positive) - ones
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def calibration_error(probability: NDArray[np.floating], target: NDArray[np.integer]) -> float:
    """Expected calibration error of the top class over 15 even bins of confidence
    (arXiv:1706.04599, equation 3).
    """
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == target
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(place, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(target))


def draw_confusion(
    matrix: NDArray[np.int64], class_names: Sequence[str], path: Path, title: str
) -> None:
    """A PNG of the matrix, rows as shares of the truth, counts written in."""
    from matplotlib.figure import Figure

    side = 2.5 + 0.45 * len(class_names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues"
    )
    for row, column in np.argwhere(matrix).tolist():
        shade = "white" if matrix[row, column] > matrix[row].sum() / 2 else "black"
        axes.text(
            column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=shade
        )
    axes.set_xticks(range(len(class_names)), class_names, rotation=90)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="said", ylabel="truth", title=title)
    figure.savefig(path, dpi=100)
