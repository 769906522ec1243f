"""TinyDet, which finds one box in an image, and BigDet, which finds up to `max_boxes` of them.

Both learn from random weights on two CPU cores. They share a trunk: a 4 x 4 space-to-depth stem,
strided residual stages, and a way back up to stride 8. Each cell of that grid proposes a box around
itself. BigDet trains every cell and hands out the `max_boxes` most certain ones as its box slots.
One-to-one targets make it suppress its own duplicates, so there is no non-maximum suppression
(NMS). TinyDet averages the cells' boxes, weighted by how certain each cell is to lie on the object.

Pretrained weights, several pyramid levels and very small objects were given up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detector.boxes import cxcywh_to_xyxy

__all__ = ["BigDet", "Candidates", "Slots", "TinyDet", "Vote", "make_model", "reduced", "to_float"]

STRIDE = 8
COARSEST = 32
TINY_SIDE = 256
"""TinyDet works on images of at most this many pixels a side."""
SHARPNESS = 2.0
"""How much more the surest cells of TinyDet weigh: the background is thousands of cells."""
ABSENT_LOGIT = -30.0
"""Objectness of a slot for which the grid has no cell: a probability of 1e-13."""


class Candidates(NamedTuple):
    """What BigDet predicts in each of N grid cells, normalised to the canvas.

    Attributes
    ----------
    box_xyxy
        [B, N, 4], the box of each cell.
    objectness
        [B, N] logits.
    classes
        [B, N, C] logits; C is 0 with one class or none.
    helper
        [B, N] logits of a second objectness, which is trained one to many and used in training
        only.
    cell_xy
        [N, 2], the centres of the cells.
    """

    box_xyxy: Tensor
    objectness: Tensor
    classes: Tensor
    helper: Tensor
    cell_xy: Tensor


class Vote(NamedTuple):
    """What TinyDet predicts, and the votes of the N cells that it was averaged from.

    Attributes
    ----------
    box_xyxy
        [B, 1, 4], normalised to the canvas.
    objectness
        [B, 1] logits.
    cell_box_xyxy
        [B, N, 4], the proposal of each cell.
    cell_logit
        [B, N], how certain each cell is to lie on the object.
    cell_xy
        [N, 2], the centres of the cells.
    """

    box_xyxy: Tensor
    objectness: Tensor
    cell_box_xyxy: Tensor
    cell_logit: Tensor
    cell_xy: Tensor


class Slots(NamedTuple):
    """The box slots that a detector hands out, most certain first.

    Attributes
    ----------
    box_xyxy
        [B, S, 4] in [0, 1], normalised to the canvas.
    objectness
        [B, S] logits.
    classes
        [B, S, C] logits; C is 0 with one class or none.
    """

    box_xyxy: Tensor
    objectness: Tensor
    classes: Tensor


def to_float(image: Tensor) -> Tensor:
    """Convert images to float32 in [-1, 1], in channels-last order.

    Parameters
    ----------
    image
        [B, 3, H, W], uint8 or floating point in [0, 1].
    """
    converted = torch.empty(
        image.shape, dtype=torch.float32, device=image.device, memory_format=torch.channels_last
    )
    # copy_ then mul_ is four times as fast as one multiplication that converts.
    return converted.copy_(image).mul_(2 / 255 if image.dtype == torch.uint8 else 2).sub_(1)


def reduced(image: Tensor) -> Tensor:
    """Return images [B, 3, H, W] at half the resolution, as often as a side is over TINY_SIDE.

    That is enough to find one box, at a quarter of the work.
    """
    while max(image.shape[2:]) > TINY_SIDE:
        # Rounded up, since a canvas may have an odd side.
        image = functional.adaptive_avg_pool2d(
            image, ((image.shape[2] + 1) // 2, (image.shape[3] + 1) // 2)
        )
    return image


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inside: int, outside: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(inplace=True),
        )


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv(width, width), Conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.body(x)
        return x + change


class Trunk(nn.Module):
    """Features [B, 2w, H/8, W/8] of images [B, 3, H, W], computed down to stride 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Most of the work is then done on a small grid; a strided convolution on pixels costs more.
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), Conv(48, width))
        self.down8 = nn.Sequential(Conv(width, 2 * width, 3, 2), Residual(2 * width))
        self.down16 = nn.Sequential(Conv(2 * width, 3 * width, 3, 2), Residual(3 * width))
        self.down32 = nn.Sequential(Conv(3 * width, 4 * width, 3, 2), Residual(4 * width))
        self.from32 = Conv(4 * width, 3 * width, 1)
        self.join16 = Residual(3 * width)
        self.from16 = Conv(3 * width, 2 * width, 1)
        self.join8 = Residual(2 * width)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.down8(self.stem(image))
        middle = self.down16(fine)
        coarse = self.down32(middle)
        middle = self.join16(middle + functional.interpolate(self.from32(coarse), scale_factor=2.0))
        joined: Tensor = self.join8(
            fine + functional.interpolate(self.from16(middle), scale_factor=2.0)
        )
        return joined


class Grid(nn.Module):
    """A trunk and a 1 x 1 head of `channels` numbers per cell, the first four of which are its box.

    Parameters
    ----------
    width
        Channels of the first stage.
    channels
        Numbers per cell.
    prior
        Initial logit of the two channels after the box.
    """

    def __init__(self, width: int, channels: int, prior: float) -> None:
        super().__init__()
        self.trunk = Trunk(width)
        self.head = nn.Conv2d(2 * width, channels, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        bias = self.head.bias
        assert bias is not None
        nn.init.constant_(bias, 0.0)
        # Start from "nothing here" and boxes of a tenth of the canvas.
        nn.init.constant_(bias[4:6], prior)
        nn.init.constant_(bias[2:4], -2.3)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cells' boxes, their other channels and their centres.

        Parameters
        ----------
        image
            float [B, 3, H, W] of any height and width.

        Returns
        -------
        tuple
            box_xyxy [B, N, 4], the other channels [B, N, K], and cell_xy [N, 2].
        """
        height, width = image.shape[2:]
        # At least two cells a side at the coarsest level: a batch norm needs more than one value,
        # also in a batch of one picture.
        right = max(-width % COARSEST, 2 * COARSEST - width)
        below = max(-height % COARSEST, 2 * COARSEST - height)
        image = functional.pad(image, (0, right, 0, below))
        # Half precision has too few digits for the corners of a box.
        grid = self.head(self.trunk(image.contiguous(memory_format=torch.channels_last))).float()
        raw = grid.permute(0, 2, 3, 1).flatten(1, 2)
        ys = (torch.arange(grid.shape[2], device=grid.device) + 0.5) * (STRIDE / height)
        xs = (torch.arange(grid.shape[3], device=grid.device) + 0.5) * (STRIDE / width)
        cell_xy = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).flatten(0, 1)

        # The centre lies within three cells, and a side is at most twice the canvas: no step of
        # training can make a box overflow.
        reach = cell_xy.new_tensor([3 * STRIDE / width, 3 * STRIDE / height])
        centre = cell_xy + raw[..., :2].tanh() * reach
        size = raw[..., 2:4].clamp(-7, 0.7).exp()
        return cxcywh_to_xyxy(torch.cat([centre, size], dim=-1)), raw[..., 4:], cell_xy


class BigDet(nn.Module):
    """A detector of up to `max_boxes` boxes in an image.

    `forward` returns the prediction of every cell, for the loss; `slots` the most certain of them.
    """

    kind = "big"

    def __init__(self, max_boxes: int, class_count: int = 1, width: int = 32) -> None:
        super().__init__()
        self.max_boxes, self.class_count, self.width = max_boxes, class_count, width
        self.class_channels = class_count if class_count > 1 else 0
        self.grid = Grid(width, 6 + self.class_channels, prior=-4.6)

    def forward(self, image: Tensor) -> Candidates:
        """Return the predictions of all cells for float32 [B, 3, H, W], as `to_float` makes it."""
        box_xyxy, rest, cell_xy = self.grid(image)
        return Candidates(box_xyxy, rest[..., 0], rest[..., 2:], rest[..., 1], cell_xy)

    def slots(self, candidates: Candidates) -> Slots:
        """Return the `max_boxes` most certain candidates."""
        # Without NMS, which added only about 0.02 AP50 in trials of five minutes.
        cells = candidates.objectness.shape[1]
        objectness, at = candidates.objectness.topk(min(self.max_boxes, cells), dim=1)
        at = at.unsqueeze(-1)
        box_xyxy = candidates.box_xyxy.clamp(0, 1).gather(1, at.expand(-1, -1, 4))
        classes = candidates.classes.gather(1, at.expand(-1, -1, self.class_channels))

        # A small canvas has fewer cells than the warehouse has box slots.
        spare = self.max_boxes - cells
        if spare > 0:
            objectness = functional.pad(objectness, (0, spare), value=ABSENT_LOGIT)
            box_xyxy = functional.pad(box_xyxy, (0, 0, 0, spare))
            classes = functional.pad(classes, (0, 0, 0, spare))
        return Slots(box_xyxy, objectness, classes)

    def describe(self) -> dict[str, str | int]:
        """Return what `make_model` needs to build the same model again."""
        return {
            "kind": self.kind,
            "max_boxes": self.max_boxes,
            "class_count": self.class_count,
            "width": self.width,
        }


class TinyDet(nn.Module):
    """A detector of one box in an image: cells vote for it, weighted by an attention over them."""

    kind = "tiny"

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width, self.max_boxes, self.class_count = width, 1, 1
        self.grid = Grid(width, 6, prior=-3.0)

    def forward(self, image: Tensor) -> Vote:
        """Return the vote for float32 [B, 3, H, W], as `to_float` makes it."""
        cell_box, rest, cell_xy = self.grid(reduced(image))
        share = (SHARPNESS * rest[..., 0]).softmax(dim=1)
        box_xyxy = (share.unsqueeze(-1) * cell_box).sum(dim=1, keepdim=True)
        objectness = (share * rest[..., 1]).sum(dim=1, keepdim=True)
        return Vote(box_xyxy, objectness, cell_box, rest[..., 0], cell_xy)

    def slots(self, vote: Vote) -> Slots:
        """Return one box slot per image."""
        no_classes = vote.objectness.new_zeros((*vote.objectness.shape, 0))
        return Slots(vote.box_xyxy.clamp(0, 1), vote.objectness, no_classes)

    def describe(self) -> dict[str, str | int]:
        """Return what `make_model` needs to build the same model again."""
        return {"kind": self.kind, "width": self.width}


def make_model(
    *, kind: str, max_boxes: int = 1, class_count: int = 1, width: int | None = None
) -> BigDet | TinyDet:
    """Return the model that `describe` wrote down, with fresh weights of the global generator."""
    if kind == "tiny":
        return TinyDet(width or 24)
    return BigDet(max_boxes, class_count, width or 32)
