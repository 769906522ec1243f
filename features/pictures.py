"""Pictures on their way into an encoder that learns: light augmentation, and the class of each.

Augmentation is a function of (seed, epoch, sample index), never of the batch: one affine map
(flips, zoom, shift, rotation) sampled bilinearly with the border repeated, then contrast and
brightness. Pictures are resized first, so that it costs what the encoder's size costs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from features.jobs import picture_labels
from features.settings import PictureTraining
from utils.augment import affine_warp, draws, jitter
from utils.log import get_log
from warehouse.errors import TrainingError
from warehouse.format.schema import IGNORED
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["augment_pictures", "picture_targets"]

log = get_log(__name__)
FLIP_X, FLIP_Y, ZOOM, SHIFT_X, SHIFT_Y, ROTATE, CONTRAST, BRIGHTNESS = range(8)


def augment_pictures(
    picture: Tensor, index: Tensor, epoch: int, settings: PictureTraining
) -> Tensor:
    """float32 [B, 3, H, W] in [0, 1], augmented; index: int64 [B], the samples' numbers.

    What is given is not written to.
    """

    def draw(*purposes: int) -> Tensor:
        return draws(settings.seed, epoch, index, purposes, picture.device)

    if settings.flip_x or settings.flip_y or settings.zoom or settings.shift or settings.rotate:
        zoom, turn = draw(ZOOM, ROTATE)
        shares = picture.new_tensor([settings.flip_x, settings.flip_y]).view(2, 1)
        picture = affine_warp(
            picture,
            scale=(1 + settings.zoom) ** (1 - 2 * zoom),
            angle=math.radians(settings.rotate) * (2 * turn - 1),
            flips=torch.where(draw(FLIP_X, FLIP_Y) < shares, -1.0, 1.0),
            shifts=2 * settings.shift * (2 * draw(SHIFT_X, SHIFT_Y) - 1),
        )
    if settings.contrast or settings.brightness:
        contrast, brightness = 2 * draw(CONTRAST, BRIGHTNESS) - 1
        picture = jitter(
            picture,
            contrast=1 + settings.contrast * contrast,
            brightness=1 + settings.brightness * brightness,
        )
    return picture


def picture_targets(warehouse: Warehouse, how: str) -> dict[str, Tensor]:
    """Class of every picture, int64 [n], -1 where it has none, by split: its folder's, else of its
    boxes (how: largest or commonest).

    Raises TrainingError for a warehouse without pictures or classes, and for a class without
    samples in a split.
    """
    arrays, classes = warehouse.manifest.arrays, list(warehouse.manifest.class_names)
    if "image" not in arrays:
        raise TrainingError(
            "this warehouse holds no pictures",
            where=warehouse.location,
            remedy="build one with python -m scripts.build_zarr",
        )
    if len(classes) < 2 or "train" not in warehouse.splits or len(warehouse.split("train")) == 0:
        raise TrainingError(
            "these pictures have no classes to learn",
            where=warehouse.location,
            expected="two classes and a train split",
            found=f"{len(classes)} classes",
            remedy="build with --build.format classes, or from boxes",
        )
    found = {}
    for name in warehouse.splits:
        split = warehouse.split(name)
        rows = np.arange(len(split))
        if len(rows) == 0:
            continue
        reader = split.reader(verify="always", keep=4)
        if "target" in split.specs:
            labels = read_samples(reader, ["target"], rows)["target"]
        else:
            boxes = read_samples(reader, ["box", "box_mask", "box_flags", "label"], rows)
            counted = boxes["box_mask"] & ((boxes["box_flags"] & IGNORED) == 0)
            labels = picture_labels(boxes["box"], boxes["label"], counted, how)
        counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        if not counts.all():
            raise TrainingError(
                "a class has no samples in a split",
                where=f"{warehouse.location}, {name}",
                found=classes[int(counts.argmin())],
                remedy="give the class more pictures, or leave it out with --build.classes",
            )
        if (labels < 0).any():
            log.warning(
                "%d of %d pictures of %s have no class: they teach nothing and are not scored",
                (labels < 0).sum(),
                len(split),
                name,
            )
        found[name] = torch.from_numpy(labels.astype(np.int64))
    return found
