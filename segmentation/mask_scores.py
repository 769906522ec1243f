"""How well predicted masks agree with true ones: Dice, IoU and boundary F1, from row bands, so that
a picture's size does not matter.

Everything is counted, then divided once: figures over several pictures are of all their pixels.
Unknown pixels (255) count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.training.confusion import ConfusionMatrix
from warehouse.settings import MASK_PADDING

__all__ = ["MaskTally"]

BAND = 256


@dataclass
class MaskTally:
    """Counts of any number of pictures.

    tolerance: how many pixels a boundary may be off (Euclidean) and still be matched; boundary F1
    is the harmonic mean of the shares of predicted boundary pixels near a true one and of true ones
    near a predicted one (Csurka et al., BMVC 2013). A boundary pixel of a class has a 4-neighbour
    of another class; pixels at the picture's border are none for that alone.
    """

    classes: int
    tolerance: float
    confusion: ConfusionMatrix = field(init=False)
    near: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = ConfusionMatrix(self.classes)
        self.near = np.zeros((self.classes, 4), np.int64)

    def add(
        self,
        read_said: Callable[[slice], NDArray[np.uint8]],
        read_truth: Callable[[slice], NDArray[np.uint8]],
        height: int,
    ) -> None:
        """A picture: functions of a slice of lines giving uint8 [lines, width]."""
        halo = int(np.ceil(self.tolerance)) + 2
        for start in range(0, height, BAND):
            end = min(start + BAND, height)
            low, high = max(0, start - halo), min(height, end + halo)
            said, truth = read_said(slice(low, high)), read_truth(slice(low, high))
            inside = slice(start - low, end - low)
            known = truth != MASK_PADDING
            self.confusion.add(truth[inside][known[inside]], said[inside][known[inside]])
            for index in range(self.classes):
                # An edge of the band is none of the picture's: lines beyond it are cut off by
                # `inside`.
                edges = boundary(said, index) & known, boundary(truth, index) & known
                for at, (own, other) in enumerate((edges, edges[::-1])):
                    self.near[index, 2 * at] += int(
                        (own & within(other, self.tolerance))[inside].sum()
                    )
                    self.near[index, 2 * at + 1] += int(own[inside].sum())

    def merge(self, other: MaskTally) -> None:
        self.confusion.merge(other.confusion)
        self.near += other.near

    def scores(self) -> dict[str, Any]:
        """dice, iou, boundary_f1: {class: value}; pixels: how many were known."""
        names = [str(index) for index in range(self.classes)]
        return {
            "dice": dict(zip(names, _where_present(self.confusion.dice()), strict=True)),
            "iou": dict(zip(names, _where_present(self.confusion.iou()), strict=True)),
            "boundary_f1": dict(
                zip(names, (self._boundary_f1(row) for row in self.near), strict=True)
            ),
            "pixels": int(self.confusion.counts.sum()),
        }

    @staticmethod
    def _boundary_f1(row: NDArray[np.int64]) -> float:
        said_near, said, truth_near, truth = (int(value) for value in row)
        if not said and not truth:
            return 1.0
        precision, recall = said_near / max(1, said), truth_near / max(1, truth)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _where_present(values: NDArray[np.float64]) -> list[float]:
    """The figures of the classes; a class that neither truth nor prediction has is a perfect one."""
    return [1.0 if np.isnan(value) else float(value) for value in values]


def boundary(label: NDArray[np.uint8], index: int) -> NDArray[np.bool_]:
    """Pixels of class `index` with a 4-neighbour of another known class, bool [h, w]."""
    own = label == index
    other = ~own & (label != MASK_PADDING)
    found = np.zeros_like(own)
    found[1:] |= other[:-1]
    found[:-1] |= other[1:]
    found[:, 1:] |= other[:, :-1]
    found[:, :-1] |= other[:, 1:]
    return found & own


def within(mask: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """Pixels at most `tolerance` away (Euclidean) from a true one, bool [h, w]."""
    import cv2

    reach = int(tolerance)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= tolerance**2).astype(np.uint8)
    return (
        cv2.dilate(mask.astype(np.uint8), disc, borderType=cv2.BORDER_CONSTANT, borderValue=0) > 0
    )
