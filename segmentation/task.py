"""Train a segmentation network as a task of the training loop.

The task has the loss, the augmentation, and the scores on held-out patches.

The loss is cross-entropy plus soft Dice (Milletari et al. 2016, arXiv:1606.04797). Both are means
over the known pixels of each patch and summed over patches, so that the loss does not depend on how
patches are divided into batches. Pixels of class 255 take part in neither loss nor scores.
Augmentation is a function of (seed, epoch, sample index): quarter turns, mirrors, an elastic warp,
contrast and brightness.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from segmentation.settings import SegmentTraining
from segmentation.unet import UNet
from utils.augment import draws, elastic_warp, scale_contrast, turn_and_mirror
from utils.training.confusion import ConfusionMatrix
from utils.training.task import Batch, Task, seeded
from warehouse.settings import MASK_PADDING

__all__ = [
    "SegmentTask",
    "augment_patches",
    "segmentation_loss",
]

TURN, MIRROR, CONTRAST, BRIGHTNESS, WARP = range(5)
"""Which random number decides what. The warp takes all numbers from WARP on."""
KNOTS = 6
"""Control points of the elastic warp along each side."""
MIDDLE = 128.0
"""Contrast is changed about this value of [0, 255]."""


class SegmentTask(Task):
    """A U-Net on patches; see utils.training.task.Task."""

    name, section, lr, headline = "U-Net", "segment", 3e-3, ("dice", "max")
    model: UNet

    def __init__(self, settings: SegmentTraining, *, channels: int, classes: int) -> None:
        self.settings = settings
        with seeded(settings.seed):
            self.model = UNet(
                channels=channels,
                classes=classes,
                width=settings.width,
                levels=settings.levels,
                stem=settings.stem,
            )

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return cross-entropy plus `dice_weight` times soft Dice, summed over the patches."""
        image, mask = augment_patches(
            batch["image"], batch["mask"], batch["index"], epoch, self.settings
        )
        logits = model(image)
        # In float32: sums over the pixels of a patch overflow float16.
        with torch.autocast(logits.device.type, enabled=False):
            cross, dice = segmentation_loss(logits.float(), mask)
        # `pad` marks repeated samples, which must count only once.
        real = (~batch["pad"]).float() if "pad" in batch else torch.ones_like(cross)
        total = ((cross + self.settings.dice_weight * dice) * real).sum()
        return total, {
            "cross_entropy": (cross * real).sum().detach(),
            "soft_dice": (dice * real).sum().detach(),
        }

    def evaluate(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return Dice and IoU over the pixels of the held-out patches.

        Pixels of overlaps count as often as patches show them. Scores of whole, stitched images
        are a little higher, since patches see less at their borders (docs/log.md).
        """
        confusion = ConfusionMatrix(self.model.classes)
        with torch.inference_mode():
            for batch in batches:
                predicted = model(batch["image"]).argmax(dim=1)
                truth = batch["mask"].long()
                known = truth != MASK_PADDING
                if "pad" in batch:
                    known &= ~batch["pad"].view(-1, 1, 1)
                confusion.add(truth[known], predicted[known])
        # As in `MaskTally`: a class that occurs neither in truth nor in prediction was predicted
        # without error.
        dice = np.nan_to_num(confusion.dice(), nan=1.0).tolist()
        iou = np.nan_to_num(confusion.iou(), nan=1.0).tolist()
        return {
            "dice": float(np.mean(dice)),
            **{f"dice_{index}": value for index, value in enumerate(dice)},
            "iou": float(np.mean(iou)),
        }

    def describe(self) -> dict[str, Any]:
        """Return JSON from which `restore_unet` builds the model."""
        return self.model.describe()

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """Draw the training loss and the held-out Dice of each class as a PNG."""
        from segmentation.mask_sheet import draw_curve

        draw_curve(history, path, self.model.classes)


def segmentation_loss(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the soft Dice loss of each patch.

    Parameters
    ----------
    logits
        float32 [B, classes, H, W].
    mask
        uint8 [B, H, W], 255 where the class is unknown.

    Returns
    -------
    tuple
        Two float32 [B]: means over the known pixels, and for Dice over the classes. A patch without
        known pixels gives 0 and 0.
    """
    known = mask != MASK_PADDING
    # Class 0 in place of 255, which `one_hot` refuses; `known` takes these pixels out again.
    target = torch.where(known, mask, 0).long()
    count = known.sum(dim=(1, 2)).clamp_min(1)
    pixels = functional.cross_entropy(logits, target, reduction="none") * known
    cross = pixels.sum(dim=(1, 2)) / count

    predicted = logits.softmax(dim=1) * known.unsqueeze(1)
    truth = functional.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * known.unsqueeze(1)
    shared = (predicted * truth).sum(dim=(2, 3))
    sizes = predicted.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    # Plus one pixel, so that a patch without known pixels gives 0 instead of 0 / 0.
    dice = 1 - ((2 * shared + 1) / (sizes + 1)).mean(dim=1)
    return cross, dice


def augment_patches(
    image: Tensor, mask: Tensor, index: Tensor, epoch: int, settings: SegmentTraining
) -> tuple[Tensor, Tensor]:
    """Augment patches and their masks in the same way; the inputs are not changed.

    Parameters
    ----------
    image
        uint8 or float [B, C, H, W] in [0, 255].
    mask
        uint8 [B, H, W].
    index
        int64 [B], the sample indices.

    Returns
    -------
    tuple
        float32 [B, C, H, W] in [0, 255], and uint8 [B, H, W].
    """

    def draw(*purposes: int) -> Tensor:
        return draws(settings.seed, epoch, index, purposes, image.device)

    picture = image.float()
    if settings.turns:
        turn, mirror = draw(TURN, MIRROR)
        turns = (turn * 4).long().tolist()
        mirrored = (mirror < 0.5).tolist()
        # Half turns only where a quarter turn would change the shape.
        if picture.shape[-1] != picture.shape[-2]:
            turns = [number & 2 for number in turns]
        picture = turn_and_mirror(picture, turns, mirrored, axes=(-2, -1))
        mask = turn_and_mirror(mask, turns, mirrored, axes=(-2, -1))
    if settings.elastic:
        knots = draw(*range(WARP, WARP + 4 * KNOTS * KNOTS)).T
        # The sum of two uniform numbers is nearly normal; the factor gives it variance 1.
        moved = (knots[:, ::2] + knots[:, 1::2] - 1).view(-1, 2, KNOTS, KNOTS) * 6**0.5
        picture, mask = elastic_warp(picture, mask, moved * settings.elastic)
    if settings.contrast or settings.brightness:
        contrast, brightness = 2 * draw(CONTRAST, BRIGHTNESS) - 1
        shift = 128 * settings.brightness * brightness
        picture = scale_contrast(picture, 1 + settings.contrast * contrast, about=MIDDLE)
        picture = (picture + shift.view(-1, 1, 1, 1)).clamp(0, 255)
    return picture, mask
