"""Score the probabilities of a classifier: accuracy, macro F1, AUROC and calibration error.

All of it is NumPy over arrays in memory. Scores over classes are means that give every class the
same weight.
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
"""Of the calibration error, as in the paper that introduced it."""


def classification_metrics(
    probability: NDArray[np.floating], target: NDArray[np.integer]
) -> dict[str, float]:
    """Return the metrics of predicted probabilities.

    Parameters
    ----------
    probability
        [n, C]; each row sums to 1.
    target
        [n], in 0..C-1.

    Returns
    -------
    dict
        `accuracy`, `macro_f1`, `auroc` and `ece`, all in [0, 1]. `auroc` is the mean over the
        classes that occur in some samples but not in all, and is absent where no class does.
    """
    classes = probability.shape[1]
    matrix = ConfusionMatrix.of(target, probability.argmax(axis=1), classes)
    metrics = {
        "accuracy": matrix.accuracy,
        "macro_f1": matrix.macro_f1,
        "ece": calibration_error(probability, target),
    }
    areas = []
    for index in range(classes):
        positive = target == index
        # With samples of one kind only, the area is undefined.
        if 0 < positive.sum() < len(target):
            areas.append(auroc(probability[:, index], positive))
    if areas:
        metrics["auroc"] = float(np.mean(areas))
    return metrics


def auroc(score: NDArray[np.floating], positive: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve, in [0, 1].

    It is the probability that a positive sample scores above a negative one, where ties count half
    (the Mann-Whitney U statistic divided by the number of pairs).

    Parameters
    ----------
    score, positive
        [n]; at least one sample of each kind.
    """
    _, position, counts = np.unique(score, return_inverse=True, return_counts=True)
    # Ranks begin at 1; tied samples share the mean of their ranks.
    rank = (np.cumsum(counts) - (counts - 1) / 2)[position]
    ones = int(positive.sum())
    zeros = len(positive) - ones
    return float((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def calibration_error(probability: NDArray[np.floating], target: NDArray[np.integer]) -> float:
    """Return the expected calibration error of the top class, over BINS equal bins of confidence.

    Parameters
    ----------
    probability
        [n, C]; each row sums to 1.
    target
        [n], in 0..C-1.

    Notes
    -----
    Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence = probability.max(axis=1)
    right = probability.argmax(axis=1) == target
    # Bins are open below and closed above, as in the paper.
    bin_index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bin_index, right - confidence, BINS)
    return float(np.abs(gaps).sum() / len(target))


def draw_confusion(
    matrix: NDArray[np.int64], class_names: Sequence[str], path: Path, title: str
) -> None:
    """Draw a confusion matrix as a PNG.

    Parameters
    ----------
    matrix
        int64 [C, C], the row is the true class. Colours are shares of the row; counts are written
        in the cells.
    """
    from matplotlib.figure import Figure

    side = 2.5 + 0.45 * len(class_names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1, cmap="Blues"
    )
    # Only counts that are not 0: a matrix of many classes is mostly zeros.
    for row, column in np.argwhere(matrix).tolist():
        shade = "white" if matrix[row, column] > matrix[row].sum() / 2 else "black"
        axes.text(
            column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8, color=shade
        )
    axes.set_xticks(range(len(class_names)), class_names, rotation=90)
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, dpi=100)
