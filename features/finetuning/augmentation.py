"""Light augmentation of images on their way into an encoder that learns.

A function of (seed, epoch, sample index) and never of the batch: one affine map (flips, zoom,
shift, rotation), sampled bilinearly with the border repeated, then contrast and brightness. Images
are resized to the encoder's size before, so that the cost does not depend on their own size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from features.finetuning.settings import FinetuneTraining
from utils.augment import affine_warp, draws, jitter

__all__ = ["augment_pictures"]

FLIP_X, FLIP_Y, ZOOM, SHIFT_X, SHIFT_Y, ROTATE, CONTRAST, BRIGHTNESS = range(8)
"""Which random number decides what; a new effect takes a new number, or old runs would change."""


def augment_pictures(
    picture: Tensor, index: Tensor, epoch: int, settings: FinetuneTraining
) -> Tensor:
    """Augment a batch; the input is not changed.

    Parameters
    ----------
    picture
        float32 [B, 3, H, W] in [0, 1].
    index
        int64 [B], the sample indices.

    Returns
    -------
    Tensor
        float32 [B, 3, H, W] in [0, 1].
    """

    def draw(*purposes: int) -> Tensor:
        return draws(settings.seed, epoch, index, purposes, picture.device)

    if settings.flip_x or settings.flip_y or settings.zoom or settings.shift or settings.rotate:
        zoom, turn = draw(ZOOM, ROTATE)
        shares = picture.new_tensor([settings.flip_x, settings.flip_y]).view(2, 1)
        picture = affine_warp(
            picture,
            # A power: enlarging and reducing by the same factor are equally likely.
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
