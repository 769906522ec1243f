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
from torch.nn import functional

from features.jobs import picture_labels
from features.settings import PictureTraining
from utils.augment import uniform
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
    numbers = index.cpu().numpy()

    def draw(purpose: int) -> Tensor:
        return (
            torch.from_numpy(uniform(settings.seed, epoch, numbers, purpose))
            .float()
            .to(picture.device)
        )

    if settings.flip_x or settings.flip_y or settings.zoom or settings.shift or settings.rotate:
        scale = (1 + settings.zoom) ** (1 - 2 * draw(ZOOM))
        angle = math.radians(settings.rotate) * (2 * draw(ROTATE) - 1)
        signs = [
            torch.where(draw(purpose) < share, -1.0, 1.0)
            for purpose, share in ((FLIP_X, settings.flip_x), (FLIP_Y, settings.flip_y))
        ]
        shifts = [2 * settings.shift * (2 * draw(purpose) - 1) for purpose in (SHIFT_X, SHIFT_Y)]
        # Where each point comes from, in [-1, 1] along both sides; sides of unequal length keep
        # angles right.
        ratio = picture.shape[2] / picture.shape[3]
        sine, cosine = scale * angle.sin(), scale * angle.cos()
        rows = [
            torch.stack([cosine * signs[0], -sine * ratio * signs[1], shifts[0]], dim=1),
            torch.stack([sine / ratio * signs[0], cosine * signs[1], shifts[1]], dim=1),
        ]
        grid = functional.affine_grid(
            torch.stack(rows, dim=1), list(picture.shape), align_corners=False
        )
        picture = functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)
    if settings.contrast or settings.brightness:
        contrast, brightness = (
            (1 + limit * (2 * draw(purpose) - 1)).view(-1, 1, 1, 1)
            for limit, purpose in ((settings.contrast, CONTRAST), (settings.brightness, BRIGHTNESS))
        )
        mean = picture.mean(dim=(1, 2, 3), keepdim=True)
        picture = (((picture - mean) * contrast + mean) * brightness).clamp(0, 1)
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
