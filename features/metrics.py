"""How good a classifier's probabilities are.

Accuracy, macro F1, AUROC, calibration error, confusion matrix. NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "auroc",
    "calibration_error",
    "classification_metrics",
    "confusion_matrix",
    "draw_confusion",
    "macro_f1",
]

BINS = 15


def classification_metrics(
    probability: NDArray[np.floating], target: NDArray[np.integer]
) -> dict[str, float]:
    """probability: [n, C], rows sum to 1; target: [n] in 0..C-1. Keys accuracy, macro_f1, auroc,
    ece, all in [0, 1].

    auroc is the mean over classes that have both kinds of samples, and left out when none has.
    """
    matrix = confusion_matrix(target, probability.argmax(axis=1), probability.shape[1])
    out = {
        "accuracy": float(np.trace(matrix) / matrix.sum()),
        "macro_f1": macro_f1(matrix),
        "ece": calibration_error(probability, target),
    }
    areas = [
        auroc(probability[:, at], target == at)
        for at in range(probability.shape[1])
        if 0 < (target == at).sum() < len(target)
    ]
    return out | ({"auroc": float(np.mean(areas))} if areas else {})


def confusion_matrix(
    target: NDArray[np.integer], said: NDArray[np.integer], classes: int
) -> NDArray[np.int64]:
    """int64 [C, C]: row the truth, column what was said."""
    return np.bincount(
        target.astype(np.int64) * classes + said, minlength=classes * classes
    ).reshape(classes, classes)


def macro_f1(matrix: NDArray[np.int64]) -> float:
    """Mean of 2 TP / (2 TP + FP + FN) over the classes that occur in the truth or in what was said."""
    hit, both = np.diag(matrix), matrix.sum(axis=0) + matrix.sum(axis=1)
    return float(np.mean(2 * hit[both > 0] / both[both > 0]))


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
