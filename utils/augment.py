"""Augmentations of images, each a function of (seed, epoch, sample index) alone.

Purpose: the one set of effects for all trainers: random draws, warps, quarter turns, colour; and
  `augment`, which puts some together for images with boxes.
Used by: detector.task, features.finetuning.augmentation, segmentation.task, vqvae.block_sampling
Design notes: random numbers are hashed from (seed, epoch, sample index, purpose), so no generator
  has a state to keep, and a sample looks the same for any engine, worker count, rank count and
  batch size, and after resuming. Effects work on the whole batch on its device, after the copy,
  where a uint8 picture is still a quarter of its size. A trainer has its own numbers for purposes,
  and decides which effects its labels allow.
Assistant guidance: when extending: a new effect takes a new purpose number, never one in use, or
  old runs change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from utils.loading.orders import mix64
from utils.training.settings import AugmentSettings
from warehouse.format.schema import DIFFICULT

__all__ = [
    "affine_warp",
    "augment",
    "draws",
    "elastic_warp",
    "jitter",
    "scale_contrast",
    "turn_and_mirror",
    "uniform",
]

FLIP_X, FLIP_Y, BRIGHTNESS, CONTRAST, SATURATION, SCALE, ASPECT, SHIFT_X, SHIFT_Y = range(9)
PURPOSES = 9
LUMA = (0.299, 0.587, 0.114)
PAD = 114 / 255
"""What shows where a picture was moved away: the letterbox's default padding."""
MIN_VISIBLE = 0.3
"""A box of which less than this share is still on the canvas becomes an ignored one."""


def uniform(seed: int, epoch: int, index: NDArray[np.int64], purpose: int) -> NDArray[np.float64]:
    """Draw one number in [0, 1) for each sample.

    Parameters
    ----------
    seed, epoch
        Of the training run.
    index
        Sample numbers, int64 ``[B]``.
    purpose
        What the numbers are for; different purposes give independent numbers.

    Returns
    -------
    ndarray
        float64 ``[B]``.

    Notes
    -----
    The four numbers are hashed one after the other with splitmix64 (Steele, Lea, Flood 2014).
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


def draws(
    seed: int, epoch: int, index: Tensor, purposes: Iterable[int], device: torch.device
) -> Tensor:
    """Draw a number in [0, 1) for each purpose and sample, float32 ``[purposes, B]``."""
    numbers = index.cpu().numpy()
    drawn = np.stack([uniform(seed, epoch, numbers, purpose) for purpose in purposes])
    return torch.from_numpy(drawn).float().to(device)


def augment(
    batch: dict[str, Tensor], *, seed: int, epoch: int, settings: AugmentSettings
) -> dict[str, Tensor]:
    """Flip, zoom, stretch and recolour images, and move their boxes along.

    Parameters
    ----------
    batch
        "image", uint8 or float in [0, 1], ``[B, 3, H, W]``; "box", normalised xyxy
        ``[B, boxes, 4]``; "box_mask", "box_flags"; "index". Nothing in it is written to.
    seed, epoch
        Of the training run.
    settings
        The probabilities of flips, and the largest changes.

    Returns
    -------
    dict of str to Tensor
        The batch with a new "image", float32 in [0, 1], channels last, and new "box", "box_mask"
        and "box_flags". `letterbox` is left as it is: do not map augmented boxes back to the
        source with it.
    """
    image = batch["image"]
    drawn = draws(seed, epoch, batch["index"], range(PURPOSES), image.device)
    picture = torch.empty(
        image.shape, dtype=torch.float32, device=image.device, memory_format=torch.channels_last
    ).copy_(image)
    if image.dtype == torch.uint8:
        picture.mul_(1 / 255)

    moved = _move({**batch, "image": picture}, drawn, settings)
    if not (settings.brightness or settings.contrast or settings.saturation):
        return moved
    signed = 2 * drawn - 1
    saturation = 1 + settings.saturation * signed[SATURATION] if settings.saturation else None
    recoloured = jitter(
        moved["image"],
        brightness=1 + settings.brightness * signed[BRIGHTNESS],
        contrast=1 + settings.contrast * signed[CONTRAST],
        saturation=saturation,
    )
    return {**moved, "image": recoloured}


def _move(batch: dict[str, Tensor], drawn: Tensor, settings: AugmentSettings) -> dict[str, Tensor]:
    """Flip, and scale about a point drawn such that an enlarged picture fills the canvas and a
    reduced one stays on it.
    """
    if not (settings.flip_x or settings.flip_y or settings.zoom or settings.aspect):
        return batch
    picture, box, mask = batch["image"], batch["box"], batch["box_mask"]
    signed = 2 * drawn - 1
    scale = (1 + settings.zoom) ** signed[SCALE]
    stretch = (1 + settings.aspect) ** (signed[ASPECT] / 2)
    size = torch.stack([scale * stretch, scale / stretch], dim=1)
    offset = (1 - size) * torch.stack([drawn[SHIFT_X], drawn[SHIFT_Y]], dim=1)
    flip = torch.stack([drawn[FLIP_X] < settings.flip_x, drawn[FLIP_Y] < settings.flip_y], dim=1)
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


def jitter(
    picture: Tensor,
    *,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor | None = None,
) -> Tensor:
    """Change colours: saturation about a pixel's luma, contrast about a picture's mean, brightness.

    Parameters
    ----------
    picture
        float32 ``[B, 3, H, W]`` in [0, 1]; not written to.
    brightness, contrast, saturation
        A factor for each sample, ``[B]``; None leaves the saturation as it is.

    Returns
    -------
    Tensor
        A new picture, clamped to [0, 1].
    """
    if saturation is not None:
        luma = (picture * picture.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        picture = scale_contrast(picture, saturation, about=luma)

    mean = picture.mean(dim=(1, 2, 3), keepdim=True)
    # In place, since what scale_contrast returns is new: no further copy of a batch is needed.
    recoloured = scale_contrast(picture, contrast, about=mean)
    return recoloured.mul_(brightness.view(-1, 1, 1, 1)).clamp_(0, 1)


def scale_contrast(picture: Tensor, factor: Tensor, *, about: Tensor | float) -> Tensor:
    """Scale the differences from `about` by a factor for each sample, ``[B]``."""
    return (picture - about).mul_(factor.view(-1, 1, 1, 1)).add_(about)


def turn_and_mirror(
    array: Tensor, turns: Sequence[int], mirrored: Sequence[bool], *, axes: tuple[int, int]
) -> Tensor:
    """Turn each sample by quarters, then mirror it.

    Parameters
    ----------
    array
        ``[B, ...]``, of any type.
    turns
        Quarter turns of each sample.
    mirrored
        Whether a sample is mirrored along x after it has been turned.
    axes
        The axes (y, x) of one sample, without the batch's. Odd turns need sides of equal length.
    """
    moved = []
    for sample, turn, mirror in zip(array, turns, mirrored, strict=True):
        turned = sample.rot90(turn, axes)
        moved.append(turned.flip(axes[1]) if mirror else turned)
    return torch.stack(moved)


def affine_warp(
    picture: Tensor, *, scale: Tensor, angle: Tensor, flips: Tensor, shifts: Tensor
) -> Tensor:
    """Rotate, scale, flip and shift pictures; what comes in at a border repeats it.

    Parameters
    ----------
    picture
        float32 ``[B, C, H, W]``.
    scale, angle
        Of each sample, ``[B]``: the size of the part that is shown, and radians.
    flips
        1 or -1 along x and y, ``[2, B]``.
    shifts
        Along x and y, ``[2, B]``, in units of half a side.
    """
    # Each point's place in the source, in [-1, 1] along both sides: the ratio of the sides keeps
    # angles right where they differ.
    ratio = picture.shape[2] / picture.shape[3]
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    rows = [
        torch.stack([cosine * flips[0], -sine * ratio * flips[1], shifts[0]], dim=1),
        torch.stack([sine / ratio * flips[0], cosine * flips[1], shifts[1]], dim=1),
    ]
    grid = functional.affine_grid(
        torch.stack(rows, dim=1), list(picture.shape), align_corners=False
    )
    return functional.grid_sample(picture, grid, padding_mode="border", align_corners=False)


def elastic_warp(picture: Tensor, mask: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Warp pictures and their masks by displacements that vary smoothly.

    Parameters
    ----------
    picture
        float32 ``[B, C, H, W]``.
    mask
        uint8 ``[B, H, W]``; it takes the nearest pixel's class.
    knots
        Displacements of k by k control points in pixels, x then y, ``[B, 2, k, k]``; bicubic
        between them.
    """
    height, width = picture.shape[2:]
    scale = knots.new_tensor([2 / width, 2 / height]).view(1, 2, 1, 1)
    shift = functional.interpolate(
        knots * scale, size=(height, width), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    x, y = (
        (torch.arange(side, device=picture.device) + 0.5) * 2 / side - 1 for side in (width, height)
    )
    still = torch.stack([x.expand(height, width), y.view(-1, 1).expand(height, width)], dim=-1)
    grid = still + shift

    moved = functional.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)
    labels = functional.grid_sample(
        mask.unsqueeze(1).float(),
        grid,
        mode="nearest",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved, labels.squeeze(1).to(torch.uint8)
