"""Flips, zoom and colour jitter on a batch, as a function of (seed, epoch, sample index) alone.

Purpose: the same sample looks the same in epoch e for any engine, worker count, rank count, batch
  size and after resume.
Used by: detector.task, features.pictures, segmentation.task, vqvae.block_sampling
Design notes: random numbers are hashed (splitmix64) from (seed, epoch, sample index, purpose), so
  no generator has a state to keep. Works on the whole batch on its device, after the copy, where a
  uint8 picture is still a quarter of its size. Boxes follow flips; labels, masks and geometry that
  a flip would falsify are listed in FLIPPED or refused.
Assistant guidance: when extending: a new effect takes a new purpose number, never one in use, or
  old runs change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from utils.samplers import mix64
from utils.training.settings import AugmentSettings
from warehouse.format.schema import DIFFICULT

__all__ = ["augment", "uniform"]

FLIP_X, FLIP_Y, BRIGHTNESS, CONTRAST, SATURATION, SCALE, ASPECT, SHIFT_X, SHIFT_Y = range(9)
PURPOSES = 9
LUMA = (0.299, 0.587, 0.114)
PAD = 114 / 255
"""What shows where a picture was moved away: the letterbox's default padding."""
MIN_VISIBLE = 0.3
"""A box of which less than this share is still on the canvas becomes an ignored one."""


def uniform(seed: int, epoch: int, index: NDArray[np.int64], purpose: int) -> NDArray[np.float64]:
    """One number in [0, 1) a sample. index.

    Int64 [B]. splitmix64 (Steele, Lea, Flood 2014) over the four numbers.
    """
    state = np.zeros(len(index), np.uint64)
    for word in (
        np.uint64(seed % 2**64),
        np.uint64(epoch),
        index.astype(np.uint64),
        np.uint64(purpose),
    ):
        state = mix64(state ^ (word * np.ones(1, np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def augment(
    batch: dict[str, Tensor], *, seed: int, epoch: int, settings: AugmentSettings
) -> dict[str, Tensor]:
    """A new batch: "image" float32 [B, 3, H, W] in [0, 1] (channels last), "box", "box_mask" and
    "box_flags" that follow it.

    batch: "image" uint8 or float in [0, 1], "box" xyxy normalised, "box_mask", "box_flags",
    "index". What is given is not written to. `letterbox` is left as it is: do not map augmented
    boxes back to the source.
    """
    image, index = batch["image"], batch["index"].cpu().numpy()
    draws = (
        torch.from_numpy(
            np.stack([uniform(seed, epoch, index, purpose) for purpose in range(PURPOSES)])
        )
        .float()
        .to(image.device)
    )
    picture = torch.empty(
        image.shape, dtype=torch.float32, device=image.device, memory_format=torch.channels_last
    ).copy_(image)
    if image.dtype == torch.uint8:
        picture.mul_(1 / 255)
    moved = _move({**batch, "image": picture}, draws, settings)
    return {**moved, "image": _jitter(moved["image"], draws, settings)}


def _move(batch: dict[str, Tensor], draws: Tensor, settings: AugmentSettings) -> dict[str, Tensor]:
    """Flip, and scale about a point drawn such that an enlarged picture fills the canvas and a
    reduced one stays on it.
    """
    if not (settings.flip_x or settings.flip_y or settings.zoom or settings.aspect):
        return batch
    picture, box, mask = batch["image"], batch["box"], batch["box_mask"]
    signed = 2 * draws - 1
    scale = (1 + settings.zoom) ** signed[SCALE]
    stretch = (1 + settings.aspect) ** (signed[ASPECT] / 2)
    size = torch.stack([scale * stretch, scale / stretch], dim=1)
    offset = (1 - size) * torch.stack([draws[SHIFT_X], draws[SHIFT_Y]], dim=1)
    flip = torch.stack([draws[FLIP_X] < settings.flip_x, draws[FLIP_Y] < settings.flip_y], dim=1)
    # Per axis [B, 2]: canvas = source * size + offset; a flip is a negative size.
    offset, size = torch.where(flip, offset + size, offset), torch.where(flip, -size, size)
    image = functional.grid_sample(
        picture.sub_(PAD), _source_grid(picture, size, offset), align_corners=False
    ).add_(PAD)
    ends = box * size.repeat(1, 2).unsqueeze(1) + offset.repeat(1, 2).unsqueeze(1)
    whole = torch.cat(
        [torch.minimum(ends[..., :2], ends[..., 2:]), torch.maximum(ends[..., :2], ends[..., 2:])],
        dim=-1,
    )
    inside = whole.clamp(0, 1)
    visible = _area(inside) / _area(whole).clamp_min(1e-9)
    flags = torch.where(
        mask & (visible < MIN_VISIBLE), batch["box_flags"] | DIFFICULT, batch["box_flags"]
    )
    stays = mask & (visible > 0)
    return {
        **batch,
        "image": image,
        "box": torch.where(stays.unsqueeze(-1), inside, 0.0),
        "box_mask": stays,
        "box_flags": flags,
    }


def _source_grid(picture: Tensor, size: Tensor, offset: Tensor) -> Tensor:
    """[B, H, W, 2] for grid_sample: where each canvas point lies in the source, in [-1, 1].

    Four times as fast as affine_grid.
    """
    height, width = picture.shape[2:]
    axes = []
    for axis, count in ((0, width), (1, height)):
        centres = (torch.arange(count, device=picture.device) + 0.5) / count
        axes.append(2 * (centres - offset[:, axis, None]) / size[:, axis, None] - 1)
    return torch.stack(
        [axes[0][:, None, :].expand(-1, height, -1), axes[1][:, :, None].expand(-1, -1, width)],
        dim=-1,
    )


def _area(box_xyxy: Tensor) -> Tensor:
    return (box_xyxy[..., 2] - box_xyxy[..., 0]) * (box_xyxy[..., 3] - box_xyxy[..., 1])


def _jitter(picture: Tensor, draws: Tensor, settings: AugmentSettings) -> Tensor:
    """Saturation about the pixel's luma, contrast about the picture's mean, brightness by a factor;
    clamped to [0, 1].
    """
    limits = (settings.brightness, settings.contrast, settings.saturation)
    if not any(limits):
        return picture
    brightness, contrast, saturation = (
        (1 + limit * (2 * draws[purpose] - 1)).view(-1, 1, 1, 1)
        for limit, purpose in zip(limits, (BRIGHTNESS, CONTRAST, SATURATION), strict=True)
    )
    if settings.saturation:
        luma = (picture * picture.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        picture = luma + (picture - luma) * saturation
    mean = picture.mean(dim=(1, 2, 3), keepdim=True)
    return ((picture - mean).mul_(contrast).add_(mean).mul_(brightness)).clamp_(0, 1)
