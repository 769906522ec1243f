"""TinyDet, one box a picture, and BigDet, `max_boxes` of them. Both learn from random weights on
two CPU cores.

One trunk: a 4 x 4 space-to-depth stem (most of the work is then done on a small grid), strided
residual stages, and a way back up to stride 8. Each cell proposes a box around itself. BigDet
trains every cell and hands out the `max_boxes` most certain ones as its slots; one-to-one targets
make it suppress its own duplicates, so there is no NMS. TinyDet averages the cells' boxes, weighted
by how sure each cell is to lie on the thing. Given up: pretrained weights, several pyramid levels,
very small objects.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from detector.boxes import cxcywh_to_xyxy

__all__ = ["BigDet", "Candidates", "Slots", "TinyDet", "Vote", "make_model", "reduced", "to_float"]

STRIDE = 8
COARSEST = 32
TINY_SIDE = 256
"""TinyDet looks at pictures of at most this many pixels a side."""
SHARPNESS = 2.0
"""How much more the surest cells of TinyDet weigh: the background is thousands of cells."""
ABSENT_LOGIT = -30.0
"""Objectness of a slot for which the grid has no cell: a probability of 1e-13."""


class Candidates(NamedTuple):
    """What each of the N grid cells says. box_xyxy [B, N, 4], objectness [B, N] logits, classes [B,
    N, C] logits (C = 0 with one class or none), helper [B, N]: a second objectness, trained one to
    many, that only training looks at; cell_xy [N, 2]: the cells' centres. Boxes and centres are
    normalised to the canvas."""

    box_xyxy: Tensor
    objectness: Tensor
    classes: Tensor
    helper: Tensor
    cell_xy: Tensor


class Vote(NamedTuple):
    """What TinyDet says: box_xyxy [B, 1, 4], objectness [B, 1] logits; and how it came about:
    cell_box_xyxy [B, N, 4], each cell's proposal, cell_logit [B, N], how sure it is to lie on the
    thing, cell_xy [N, 2], the cells' centres."""

    box_xyxy: Tensor
    objectness: Tensor
    cell_box_xyxy: Tensor
    cell_logit: Tensor
    cell_xy: Tensor


class Slots(NamedTuple):
    """What a detector hands out: box_xyxy [B, S, 4] normalised to the canvas, in [0, 1]; objectness
    [B, S] logits, highest first; classes [B, S, C] logits, C = 0 with one class or none."""

    box_xyxy: Tensor
    objectness: Tensor
    classes: Tensor


def to_float(image: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] on its device -> float32 in [-1, 1], channels last.

    Float pictures are taken as [0, 1].
    """
    picture = torch.empty(
        image.shape, dtype=torch.float32, device=image.device, memory_format=torch.channels_last
    )
    # copy_ then mul_ is four times as fast as one multiplication that converts.
    return picture.copy_(image).mul_(2 / 255 if image.dtype == torch.uint8 else 2).sub_(1)


def reduced(picture: Tensor) -> Tensor:
    """float [B, 3, H, W] -> the same at half the resolution while a side is over TINY_SIDE.

    Enough for one box, a quarter of the work.
    """
    while max(picture.shape[2:]) > TINY_SIDE:
        picture = functional.adaptive_avg_pool2d(
            picture, ((picture.shape[2] + 1) // 2, (picture.shape[3] + 1) // 2)
        )
    return picture


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inside: int, outside: int, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(inplace=True),
        )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv(width, width), Conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.body(x)
        return x + change


class Trunk(nn.Module):
    """[B, 3, H, W] -> [B, 2w, H/8, W/8], having looked at the picture down to stride 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), Conv(48, width))
        self.down8 = nn.Sequential(Conv(width, 2 * width, 3, 2), Residual(2 * width))
        self.down16 = nn.Sequential(Conv(2 * width, 3 * width, 3, 2), Residual(3 * width))
        self.down32 = nn.Sequential(Conv(3 * width, 4 * width, 3, 2), Residual(4 * width))
        self.from32 = Conv(4 * width, 3 * width, 1)
        self.join16 = Residual(3 * width)
        self.from16 = Conv(3 * width, 2 * width, 1)
        self.join8 = Residual(2 * width)

    def forward(self, picture: Tensor) -> Tensor:
        fine = self.down8(self.stem(picture))
        middle = self.down16(fine)
        coarse = self.down32(middle)
        middle = self.join16(middle + functional.interpolate(self.from32(coarse), scale_factor=2.0))
        joined: Tensor = self.join8(
            fine + functional.interpolate(self.from16(middle), scale_factor=2.0)
        )
        return joined


class Grid(nn.Module):
    """Trunk and a 1 x 1 head: `channels` numbers a cell, the first four of which are its box."""

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

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float [B, 3, H, W] -> box_xyxy [B, N, 4], the other channels [B, N, K], cell_xy [N, 2].

        Any H, W.
        """
        height, width = picture.shape[2:]
        # At least two cells a side at the coarsest level: a batch norm needs more than one value,
        # also in a batch of one picture.
        right, below = (
            max(-width % COARSEST, 2 * COARSEST - width),
            max(-height % COARSEST, 2 * COARSEST - height),
        )
        picture = functional.pad(picture, (0, right, 0, below))
        grid = self.head(self.trunk(picture.contiguous(memory_format=torch.channels_last))).float()
        raw = grid.permute(0, 2, 3, 1).flatten(1, 2)
        ys = (torch.arange(grid.shape[2], device=grid.device) + 0.5) * (STRIDE / height)
        xs = (torch.arange(grid.shape[3], device=grid.device) + 0.5) * (STRIDE / width)
        cell_xy = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).flatten(0, 1)
        reach = cell_xy.new_tensor([3 * STRIDE / width, 3 * STRIDE / height])
        centre = cell_xy + raw[..., :2].tanh() * reach
        size = raw[..., 2:4].clamp(-7, 0.7).exp()
        return cxcywh_to_xyxy(torch.cat([centre, size], dim=-1)), raw[..., 4:], cell_xy


class BigDet(nn.Module):
    """`forward` gives every cell's word (for the loss), `slots` the `max_boxes` most certain of
    them.
    """

    kind = "big"

    def __init__(self, max_boxes: int, class_count: int = 1, width: int = 32) -> None:
        super().__init__()
        self.max_boxes, self.class_count, self.width = max_boxes, class_count, width
        self.class_channels = class_count if class_count > 1 else 0
        self.grid = Grid(width, 6 + self.class_channels, prior=-4.6)

    def forward(self, picture: Tensor) -> Candidates:
        """picture: float32 [B, 3, H, W] as `to_float` makes it."""
        box_xyxy, rest, cell_xy = self.grid(picture)
        return Candidates(box_xyxy, rest[..., 0], rest[..., 2:], rest[..., 1], cell_xy)

    def slots(self, said: Candidates) -> Slots:
        wanted, there = self.max_boxes, said.objectness.shape[1]
        objectness, at = said.objectness.topk(min(wanted, there), dim=1)
        box_xyxy = said.box_xyxy.clamp(0, 1).gather(1, at.unsqueeze(-1).expand(-1, -1, 4))
        classes = said.classes.gather(1, at.unsqueeze(-1).expand(-1, -1, self.class_channels))
        if there < wanted:
            spare = wanted - there
            objectness = functional.pad(objectness, (0, spare), value=ABSENT_LOGIT)
            box_xyxy, classes = (
                functional.pad(box_xyxy, (0, 0, 0, spare)),
                functional.pad(classes, (0, 0, 0, spare)),
            )
        return Slots(box_xyxy, objectness, classes)

    def describe(self) -> dict[str, Any]:
        """What `make_model` needs to build the same model again."""
        return {
            "kind": self.kind,
            "max_boxes": self.max_boxes,
            "class_count": self.class_count,
            "width": self.width,
        }


class TinyDet(nn.Module):
    """One box and one logit a picture.

    Cells vote for a box, weighted by an attention over the cells.
    """

    kind = "tiny"

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width, self.max_boxes, self.class_count = width, 1, 1
        self.grid = Grid(width, 6, prior=-3.0)

    def forward(self, picture: Tensor) -> Vote:
        """picture: float32 [B, 3, H, W] as `to_float` makes it."""
        cell_box, rest, cell_xy = self.grid(reduced(picture))
        share = (SHARPNESS * rest[..., 0]).softmax(dim=1)
        box_xyxy = (share.unsqueeze(-1) * cell_box).sum(dim=1, keepdim=True)
        objectness = (share * rest[..., 1]).sum(dim=1, keepdim=True)
        return Vote(box_xyxy, objectness, cell_box, rest[..., 0], cell_xy)

    def slots(self, said: Vote) -> Slots:
        """One slot a picture."""
        return Slots(
            said.box_xyxy.clamp(0, 1),
            said.objectness,
            said.objectness.new_zeros((*said.objectness.shape, 0)),
        )

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "width": self.width}


def make_model(
    *, kind: str, max_boxes: int = 1, class_count: int = 1, width: int | None = None
) -> BigDet | TinyDet:
    """Return the model that `describe` wrote down, with fresh weights of the global generator."""
    if kind == "tiny":
        return TinyDet(width or 24)
    return BigDet(max_boxes, class_count, width or 32)
