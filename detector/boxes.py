"""Box algebra on tensors: conversions, overlap, and the way from the canvas to the source image.

A box is xyxy, normalised to the canvas (0 to 1 on both axes), unless a name says otherwise.
Pairwise functions broadcast over leading dimensions. Degenerate boxes are legal everywhere: their
overlap with anything is 0, never NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "box_area",
    "box_distance",
    "canvas_to_source",
    "cxcywh_to_xyxy",
    "generalized_iou",
    "pairwise_iou",
]

EPS = 1e-9
"""Least divisor; the area of a box is far larger, and that of padding is 0."""


def cxcywh_to_xyxy(box_cxcywh: Tensor) -> Tensor:
    """Convert centres and sizes [..., 4] to corners [..., 4]."""
    centre, half = box_cxcywh[..., :2], box_cxcywh[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_area(box_xyxy: Tensor) -> Tensor:
    """Return the area [...] of boxes [..., 4]; that of a reversed box is 0."""
    # Unclamped, a box reversed on both axes would have a positive area.
    size = (box_xyxy[..., 2:] - box_xyxy[..., :2]).clamp_min(0)
    return size[..., 0] * size[..., 1]


def pairwise_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return the intersection over union [..., N, M] of boxes [..., N, 4] and [..., M, 4]."""
    a, b = a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3)
    # Coordinate by coordinate: no [..., N, M, 2] temporaries, twice as fast on a CPU.
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    inter = width.clamp_min_(0).mul_(height.clamp_min_(0))
    union = box_area(a_xyxy).unsqueeze(-1) + box_area(b_xyxy).unsqueeze(-2) - inter
    return inter / union.clamp_min(EPS)


def box_distance(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Return the L1 distance [..., N, M] of the corners of [..., N, 4] and [..., M, 4]."""
    return torch.cdist(a_xyxy, b_xyxy, p=1)


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """Return GIoU in [-1, 1] and IoU in [0, 1], each [K], of boxes [K, 4] row by row.

    Notes
    -----
    GIoU = IoU - (hull - union) / hull, after Rezatofighi et al. (CVPR 2019).
    """
    a_low, a_high = a_xyxy[:, :2], a_xyxy[:, 2:]
    b_low, b_high = b_xyxy[:, :2], b_xyxy[:, 2:]
    inter_size = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp_min(0)
    hull_size = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).clamp_min(0)
    inter, hull = inter_size.prod(dim=1), hull_size.prod(dim=1)
    union = box_area(a_xyxy) + box_area(b_xyxy) - inter
    iou = inter / union.clamp_min(EPS)
    return iou - (hull - union) / hull.clamp_min(EPS), iou


def canvas_to_source(box_xyxy: Tensor, letterbox: Tensor, canvas_hw: tuple[int, int]) -> Tensor:
    """Convert boxes to pixels of the source image, clipped to it.

    Parameters
    ----------
    box_xyxy
        [B, S, 4], normalised to the canvas.
    letterbox
        [B, 6]: scale_x, scale_y, pad_x, pad_y, raw_width and raw_height, where
        canvas = source * scale + pad.
    canvas_hw
        Height and width of the canvas in pixels.

    Returns
    -------
    Tensor
        float64 [B, S, 4].
    """
    height, width = canvas_hw
    # Near 100,000 pixels, numbers of float32 are a hundredth of a pixel apart.
    geometry = letterbox.double()
    canvas = box_xyxy.double() * box_xyxy.new_tensor(
        [width, height, width, height], dtype=torch.float64
    )
    scale, pad, raw = (geometry[:, at : at + 2].repeat(1, 2).unsqueeze(1) for at in (0, 2, 4))
    return ((canvas - pad) / scale).clamp_min(0).minimum(raw)
