"""How often each class was predicted as which, and the figures that follow from it.

Purpose: `ConfusionMatrix` counts pairs of classes batch by batch and gives accuracy, IoU, Dice and
  F1.
Used by: features.finetuning.finetune_task, features.heads.train, features.metrics,
  segmentation.mask_scores, segmentation.task, vqvae.metrics, vqvae.rate.distortion
Design notes: counts are integers, so the order of the batches does not matter, and every figure is
  divided once, at the end. Pairs are counted where they lie, on a GPU too; only the matrix moves.
Assistant guidance: when extending: whoever has samples without a class leaves them out before
  `add`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ConfusionMatrix"]


class ConfusionMatrix:
    """Counts of (true class, predicted class).

    Parameters
    ----------
    classes
        C, the number of classes.

    Attributes
    ----------
    counts
        int64 [C, C]: the row is the true class, the column the predicted one.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.counts: NDArray[np.int64] = np.zeros((classes, classes), np.int64)

    @classmethod
    def of(
        cls,
        truth: NDArray[np.integer] | Tensor,
        predicted: NDArray[np.integer] | Tensor,
        classes: int,
    ) -> ConfusionMatrix:
        """Return the matrix of one set of samples."""
        matrix = cls(classes)
        matrix.add(truth, predicted)
        return matrix

    def add(
        self, truth: NDArray[np.integer] | Tensor, predicted: NDArray[np.integer] | Tensor
    ) -> None:
        """Count samples.

        Parameters
        ----------
        truth, predicted
            Integers in 0..C-1 of one shape, both NumPy or both torch on one device.
        """
        size = self.classes**2
        # In int64: a product of two uint8 classes would wrap around.
        if isinstance(truth, Tensor):
            assert isinstance(predicted, Tensor)
            pairs = truth.long() * self.classes + predicted
            counted = pairs.reshape(-1).bincount(minlength=size).cpu().numpy()
        else:
            cells = truth.astype(np.int64) * self.classes + np.asarray(predicted)
            counted = np.bincount(cells.reshape(-1), minlength=size)
        self.counts += counted.reshape(self.counts.shape)

    def merge(self, other: ConfusionMatrix) -> None:
        """Add the counts of another matrix of the same classes."""
        self.counts += other.counts

    @property
    def accuracy(self) -> float:
        """Share of the samples whose class was predicted, in [0, 1]; 0 without samples."""
        return float(self._hits.sum() / max(1, self.counts.sum()))

    def iou(self) -> NDArray[np.float64]:
        """Return |A n B| / |A u B| of each class, float64 [C]; NaN where neither has it."""
        return _ratio(self._hits, self._sizes - self._hits)

    def dice(self) -> NDArray[np.float64]:
        """Return 2 |A n B| / (|A| + |B|) of each class, float64 [C]; NaN where neither has it.

        It is also the F1 score, 2 TP / (2 TP + FP + FN).
        """
        return _ratio(2 * self._hits, self._sizes)

    @property
    def mean_iou(self) -> float:
        """Mean IoU over the classes that occur in truth or prediction; 0 without samples."""
        return _mean_of_present(self.iou())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur in truth or prediction; 0 without samples."""
        return _mean_of_present(self.dice())

    @property
    def _hits(self) -> NDArray[np.int64]:
        return self.counts.diagonal()

    @property
    def _sizes(self) -> NDArray[np.int64]:
        """How often each class is true plus how often it is predicted."""
        sizes: NDArray[np.int64] = self.counts.sum(axis=0) + self.counts.sum(axis=1)
        return sizes


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean_of_present(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else 0.0
