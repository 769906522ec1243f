"""Score how well predicted masks agree with true ones: Dice, IoU and boundary F1.

Masks are read in bands of lines, so that memory does not depend on the height of an image.
Everything is counted first and divided once, so that scores over several images are of all their
pixels: a small image weighs less than a large one.
Unknown pixels (255) are not counted anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.training.confusion import ConfusionMatrix
from warehouse.settings import MASK_PADDING

__all__ = ["MaskTally"]

BAND = 256
"""Lines that are scored at a time."""
ReadLines = Callable[[slice], NDArray[np.uint8]]
"""A slice of lines -> classes uint8 [lines, width]."""


@dataclass
class MaskTally:
    """Counts over any number of images.

    Attributes
    ----------
    classes
        Number of classes.
    tolerance
        Pixels (Euclidean distance) that a boundary may be off and still be matched.
    confusion
        Counts of (true class, predicted class).
    near
        int64 [classes, 4]: predicted boundary pixels near a true one, predicted ones, true boundary
        pixels near a predicted one, true ones.

    Notes
    -----
    Boundary F1 is the harmonic mean of the share of predicted boundary pixels near a true one and
    of true ones near a predicted one (Csurka et al., BMVC 2013). A boundary pixel of a class has a
    4-neighbour of another class; the border of an image makes no boundary.
    """

    classes: int
    tolerance: float
    confusion: ConfusionMatrix = field(init=False)
    near: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.confusion = ConfusionMatrix(self.classes)
        self.near = np.zeros((self.classes, 4), np.int64)

    def add(self, read_predicted: ReadLines, read_truth: ReadLines, height: int) -> None:
        """Count the pixels and boundaries of an image of `height` lines."""
        # Lines beyond the band that decide its boundaries and their distances: without them the
        # scores would depend on the height of a band.
        halo = int(np.ceil(self.tolerance)) + 2
        for start in range(0, height, BAND):
            end = min(start + BAND, height)
            low, high = max(0, start - halo), min(height, end + halo)
            predicted, truth = read_predicted(slice(low, high)), read_truth(slice(low, high))
            inside = slice(start - low, end - low)
            known = truth != MASK_PADDING
            # The lines of the halo are counted in their own bands.
            self.confusion.add(truth[inside][known[inside]], predicted[inside][known[inside]])
            for index in range(self.classes):
                found = boundary(predicted, index) & known
                wanted = boundary(truth, index) & known
                self.near[index] += (*self._near(found, wanted, inside), 0, 0)
                self.near[index] += (0, 0, *self._near(wanted, found, inside))

    def _near(
        self, own: NDArray[np.bool_], other: NDArray[np.bool_], inside: slice
    ) -> tuple[int, int]:
        """Count pixels of `own` near one of `other`, and pixels of `own`, in the lines `inside`."""
        near = own & within(other, self.tolerance)
        return int(near[inside].sum()), int(own[inside].sum())

    def merge(self, other: MaskTally) -> None:
        """Add the counts of another tally."""
        self.confusion.merge(other.confusion)
        self.near += other.near

    def scores(self) -> dict[str, Any]:
        """Return the scores as JSON values.

        Returns
        -------
        dict
            `dice`, `iou` and `boundary_f1` as {class: score in [0, 1]}, and `pixels`, the number
            of known pixels.
        """
        return {
            "dice": _by_class(_where_present(self.confusion.dice())),
            "iou": _by_class(_where_present(self.confusion.iou())),
            "boundary_f1": _by_class(self._boundary_f1(row) for row in self.near),
            "pixels": int(self.confusion.counts.sum()),
        }

    @staticmethod
    def _boundary_f1(row: NDArray[np.int64]) -> float:
        found_near, found, wanted_near, wanted = (int(value) for value in row)
        # As of Dice and IoU: a class that occurs nowhere was predicted without error.
        if not found and not wanted:
            return 1.0
        precision, recall = found_near / max(1, found), wanted_near / max(1, wanted)
        if precision + recall == 0:
            return 0.0
        return 2 * precision * recall / (precision + recall)


def _by_class(values: Iterable[float]) -> dict[str, float]:
    """Key scores by the strings that JSON would make of the class indices."""
    return {str(index): value for index, value in enumerate(values)}


def _where_present(values: NDArray[np.float64]) -> list[float]:
    """Return the scores, with 1 for a class that occurs neither in truth nor in prediction."""
    return [1.0 if np.isnan(value) else float(value) for value in values]


def boundary(label: NDArray[np.uint8], index: int) -> NDArray[np.bool_]:
    """Return pixels of class `index` with a 4-neighbour of another known class, bool [h, w]."""
    own: NDArray[np.bool_] = label == index
    # The rim of an unknown region is where annotation ends, not where an object does.
    other = ~own & (label != MASK_PADDING)
    found = np.zeros_like(own)
    found[1:] |= other[:-1]
    found[:-1] |= other[1:]
    found[:, 1:] |= other[:, :-1]
    found[:, :-1] |= other[:, 1:]
    return found & own


def within(mask: NDArray[np.bool_], tolerance: float) -> NDArray[np.bool_]:
    """Return pixels at most `tolerance` away (Euclidean) from a true one, bool [h, w]."""
    import cv2

    reach = int(tolerance)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = (x**2 + y**2 <= tolerance**2).astype(np.uint8)
    # With a constant border: pixels outside the image are not part of any boundary.
    wide = cv2.dilate(mask.astype(np.uint8), disc, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    near: NDArray[np.bool_] = np.asarray(wide) > 0
    return near
