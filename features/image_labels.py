"""Find the class of each image, which is that of its folder or that of its boxes.

An image without a class keeps its place, with -1: samples of features and of images have the same
indices.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.log import get_log
from warehouse.errors import TrainingError
from warehouse.format.schema import IGNORED
from warehouse.read.chunks import ChunkReader
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["picture_labels", "picture_targets", "read_labels"]

log = get_log(__name__)


def picture_labels(
    box_xyxy: NDArray[np.float32], label: NDArray[np.int16], counted: NDArray[np.bool_], how: str
) -> NDArray[np.int16]:
    """Return the class of each image by its boxes.

    Parameters
    ----------
    box_xyxy
        [n, slot, 4].
    label
        [n, slot], class of each box.
    counted
        [n, slot], whether the slot holds a box that counts.
    how
        `largest` takes the class of the largest box, `commonest` the most frequent class; the
        smaller class index where two are equally frequent.

    Returns
    -------
    array
        int16 [n]; -1 for an image without boxes.
    """
    width = box_xyxy[..., 2] - box_xyxy[..., 0]
    height = box_xyxy[..., 3] - box_xyxy[..., 1]
    # Below the area of any box, so that an empty slot is never the largest.
    area = np.where(counted, width * height, -1)
    out = np.full(len(label), -1, np.int16)
    for row in np.flatnonzero(counted.any(axis=1)):
        if how == "largest":
            out[row] = label[row, area[row].argmax()]
        else:
            out[row] = np.bincount(label[row][counted[row]]).argmax()
    return out


def read_labels(reader: ChunkReader, indices: NDArray[np.int64], how: str) -> NDArray[np.int16]:
    """Return the class of some images of a split.

    Parameters
    ----------
    indices
        int64 [n], of the images in the split.
    how
        As of `picture_labels`, for images with boxes. A class that the build stored is taken as it
        is.

    Returns
    -------
    array
        int16 [n], -1 for an image without a class.
    """
    if "target" in reader.split.specs:
        return read_samples(reader, ["target"], indices)["target"]
    boxes = read_samples(reader, ["box", "box_mask", "box_flags", "label"], indices)
    # A box that training has to ignore gives an image no class.
    counted = boxes["box_mask"] & ((boxes["box_flags"] & IGNORED) == 0)
    return picture_labels(boxes["box"], boxes["label"], counted, how)


def picture_targets(warehouse: Warehouse, how: str) -> dict[str, Tensor]:
    """Return the class of every image, by split.

    Returns
    -------
    dict
        int64 [n] by the name of the split, -1 for an image without a class. Empty splits are left
        out.

    Raises
    ------
    TrainingError
        The warehouse has no images or no classes, or a class has no samples in a split.
    """
    _require_classes(warehouse)
    targets = {}
    for name in warehouse.splits:
        split = warehouse.split(name)
        if len(split) == 0:
            continue
        reader = split.reader(verify="always", keep=4)
        labels = read_labels(reader, np.arange(len(split)), how)
        _check_labels(warehouse, name, labels)
        # int64 is the type of classes in the losses of PyTorch.
        targets[name] = torch.from_numpy(labels.astype(np.int64))
    return targets


def _require_classes(warehouse: Warehouse) -> None:
    """Raise TrainingError for a warehouse whose images have no classes to learn."""
    if "image" not in warehouse.manifest.arrays:
        raise TrainingError(
            "this warehouse holds no images",
            where=warehouse.location,
            remedy="build one with python -m scripts.build_zarr",
        )
    classes = list(warehouse.manifest.class_names)
    if len(classes) < 2 or "train" not in warehouse.splits or len(warehouse.split("train")) == 0:
        raise TrainingError(
            "these images have no classes to learn",
            where=warehouse.location,
            expected="two classes and a train split",
            found=f"{len(classes)} classes",
            remedy="build with --build.format classes, or from boxes",
        )


def _check_labels(warehouse: Warehouse, name: str, labels: NDArray[np.int16]) -> None:
    classes = list(warehouse.manifest.class_names)
    # A score of a class without samples would be undefined, and a head would never learn it.
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if not counts.all():
        raise TrainingError(
            "a class has no samples in a split",
            where=f"{warehouse.location}, {name}",
            found=classes[int(counts.argmin())],
            remedy="give the class more images, or leave it out with --build.classes",
        )
    if (labels < 0).any():
        log.warning(
            "%d of %d images of %s have no class: they are neither trained on nor scored",
            (labels < 0).sum(),
            len(labels),
            name,
        )
