"""The detection losses: L1 and GIoU of boxes, BCE of objectness, cross-entropy of classes.

Every loss is a sum over images, each divided by its own number of boxes, so that its value does not
depend on how images are distributed to batches, ranks or accumulation steps. Crowd and difficult
boxes are neither targets nor background: cells that lie on one are left out. BigDet learns one to
one, which is what inference uses, and one to many beside it (a helper objectness and more box
targets), which speeds up training and costs nothing in inference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from detector.boxes import box_area, generalized_iou, pairwise_iou
from detector.matcher import NEVER, affinity, greedy_match, spread_match
from detector.model import Candidates, Vote
from warehouse.format.schema import IGNORED

__all__ = ["LossWeights", "Truth", "big_loss", "largest_box", "make_truth", "tiny_loss"]

ON_IGNORED = 0.5
"""A prediction of which at least this share lies on an ignored box is not background."""


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the terms of a loss.

    Attributes
    ----------
    box_l1, box_giou
        Of the boxes of cells that are assigned to a true box.
    objectness
        Of the one-to-one objectness, and of TinyDet's.
    helper
        Of the one-to-many objectness.
    classes
        Of the cross-entropy of the classes.
    spread
        Cells that each true box is assigned to in the one-to-many targets.
    """

    # L1 and GIoU as in DETR (Carion et al., ECCV 2020).
    box_l1: float = 5.0
    box_giou: float = 2.0
    objectness: float = 1.0
    helper: float = 0.25
    classes: float = 0.5
    spread: int = 8


@dataclass(frozen=True, slots=True)
class Truth:
    """The true boxes of a batch.

    Attributes
    ----------
    box_xyxy
        [B, S, 4], normalised to the canvas.
    mask
        bool [B, S]: boxes that are to be found.
    ignored
        bool [B, S]: boxes that are neither target nor background.
    label
        int64 [B, S]; -1 where there is none.
    real
        bool [B]; False for a repeated sample that only fills up a rank.
    """

    box_xyxy: Tensor
    mask: Tensor
    ignored: Tensor
    label: Tensor
    real: Tensor


def make_truth(batch: dict[str, Tensor]) -> Truth:
    """Return the truth of a loader's batch, whose tensors are on the model's device already."""
    mask, ignored = batch["box_mask"], (batch["box_flags"] & IGNORED) != 0
    if "pad" in batch:
        real = ~batch["pad"]
    else:
        real = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    return Truth(batch["box"].float(), mask & ~ignored, mask & ignored, batch["label"].long(), real)


def largest_box(truth: Truth) -> Truth:
    """Return the truth with a single box slot, which holds the largest box of each image."""
    # An empty slot has the area 0 of its zeros, and so has a degenerate box: -1 is less than both.
    area = box_area(truth.box_xyxy).masked_fill(~truth.mask, -1.0)
    at = area.argmax(dim=1, keepdim=True)
    corner = at.unsqueeze(-1).expand(-1, -1, 4)
    return Truth(
        truth.box_xyxy.gather(1, corner),
        truth.mask.gather(1, at),
        truth.ignored.gather(1, at),
        truth.label.gather(1, at),
        truth.real,
    )


def big_loss(
    candidates: Candidates, truth: Truth, weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of BigDet's loss over the real images.

    Returns
    -------
    tuple
        The sum, and its unweighted terms by name, detached.
    """
    with torch.no_grad():
        targets = _targets(candidates, truth, weights.spread)
    share = truth.real.float() / truth.mask.sum(dim=1).clamp_min(1)
    one = _objectness(candidates.objectness, targets.one, targets.quality, targets.counted, share)
    many = _objectness(candidates.helper, targets.many, targets.quality, targets.counted, share)
    l1, giou, classes = _boxes(candidates, truth, targets.union, share)
    total = (
        weights.objectness * one
        + weights.helper * many
        + weights.box_l1 * l1
        + weights.box_giou * giou
        + weights.classes * classes
    )
    parts = {"objectness": one, "helper": many, "l1": l1, "giou": giou}
    if candidates.classes.shape[-1]:
        parts["classes"] = classes
    return total, {name: value.detach() for name, value in parts.items()}


def tiny_loss(vote: Vote, truth: Truth, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of TinyDet's loss over the real images, and its terms.

    Parameters
    ----------
    truth
        With a single box slot; see `largest_box`.

    Returns
    -------
    tuple
        As of `big_loss`.
    """
    here = truth.mask[:, 0] & truth.real
    counted = truth.real & ~truth.ignored[:, 0]
    bce = functional.binary_cross_entropy_with_logits(
        vote.objectness[:, 0], truth.mask[:, 0].float(), reduction="none"
    )
    one = (bce * counted).sum()
    # Multiplying by the mask keeps the shapes fixed; a masked slot's box is zeros, never NaN.
    l1 = ((vote.box_xyxy[:, 0] - truth.box_xyxy[:, 0]).abs().sum(dim=1) * here).sum()
    giou = ((1 - generalized_iou(vote.box_xyxy[:, 0], truth.box_xyxy[:, 0])[0]) * here).sum()
    cells, cell_boxes = _cell_votes(vote, truth, here, counted, weights)
    total = (
        weights.objectness * one
        + weights.box_l1 * l1
        + weights.box_giou * giou
        + cells
        + cell_boxes
    )
    parts = {"objectness": one, "l1": l1, "giou": giou, "cells": cells, "cell_boxes": cell_boxes}
    return total, {name: value.detach() for name, value in parts.items()}


def _cell_votes(
    vote: Vote, truth: Truth, here: Tensor, counted: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Return the loss of each cell's own vote: whether it lies on the box, and what the box is."""
    # Trained through the average over the cells alone, TinyDet reached a mean IoU of 0.33 in four
    # minutes; with this term and half the resolution it reached 0.81.
    #
    # The whole box counts, since the evidence is at its edges: with its middle alone training took
    # four times as long.
    on_box = _cell_in_box(vote.cell_xy, truth.box_xyxy)[:, 0] & here.unsqueeze(1)
    share = counted.float() / on_box.sum(dim=1).clamp_min(1)
    assigned = torch.where(on_box, 0, -1)
    cells = _objectness(
        vote.cell_logit, assigned, torch.ones_like(vote.cell_logit), torch.ones_like(on_box), share
    )
    l1, giou = _matched_boxes(vote.cell_box_xyxy, truth, assigned, here.float())[:2]
    return weights.objectness * cells, weights.box_l1 * l1 + weights.box_giou * giou


@dataclass(frozen=True, slots=True)
class _Targets:
    """What each cell of BigDet is to predict.

    Attributes
    ----------
    one, many, union
        int64 [B, N]: the slot of the true box of each cell, or -1, one to one, one to many, and the
        former before the latter.
    quality
        [B, N]: IoU with the true box of `union`.
    counted
        bool [B, N]: False for background cells on ignored boxes.
    """

    one: Tensor
    many: Tensor
    union: Tensor
    quality: Tensor
    counted: Tensor


def _targets(candidates: Candidates, truth: Truth, spread: int) -> _Targets:
    pairs = affinity(candidates.box_xyxy, truth.box_xyxy)
    near = _cell_in_box(candidates.cell_xy, truth.box_xyxy)
    matched = greedy_match(_prefer_certain(pairs, candidates.objectness), truth.mask)
    batch, cells = candidates.objectness.shape

    # The spare column takes the writes of true boxes that got no cell.
    one = torch.full((batch, cells + 1), -1, dtype=torch.int64, device=matched.device)
    order = torch.arange(matched.shape[1], device=matched.device).expand_as(matched)
    one = one.scatter_(1, torch.where(matched >= 0, matched, cells), order)[:, :cells]
    many = spread_match(pairs.masked_fill(~near, NEVER), truth.mask, spread)
    union = torch.where(one >= 0, one, many)
    quality = torch.zeros_like(candidates.objectness)
    # A warehouse may have no box slots at all, from which nothing can be gathered.
    if pairs.shape[1]:
        quality = pairs.gather(1, union.clamp_min(0).unsqueeze(1)).squeeze(1).clamp(0, 1)

    counted = torch.ones_like(candidates.objectness, dtype=torch.bool)
    if bool(truth.ignored.any()):
        counted = (union >= 0) | ~_on_ignored(candidates.box_xyxy, candidates.cell_xy, truth)
    return _Targets(one, many, union, quality, counted)


def _prefer_certain(pairs: Tensor, objectness: Tensor) -> Tensor:
    """Return the affinities with each IoU weighted by the certainty of its cell."""
    # Among cells whose boxes fit about equally well, the winner then stays the same from step to
    # step, and the others learn to be silent.
    certain = objectness.sigmoid().sqrt().unsqueeze(1)
    return torch.where(pairs > 0, pairs * certain, pairs)


def _cell_in_box(cell_xy: Tensor, box_xyxy: Tensor) -> Tensor:
    """Return bool [B, S, N]: whether the centre of cell N lies in box S."""
    x, y = cell_xy[:, 0], cell_xy[:, 1]
    low_x, low_y, high_x, high_y = (box_xyxy[..., at : at + 1] for at in range(4))
    return (x > low_x) & (x < high_x) & (y > low_y) & (y < high_y)


def _on_ignored(box_xyxy: Tensor, cell_xy: Tensor, truth: Truth) -> Tensor:
    """Return bool [B, N]: whether most of a predicted box, or its cell, lies on an ignored box."""
    ignored_xyxy = truth.box_xyxy * truth.ignored.unsqueeze(-1)
    iou = pairwise_iou(box_xyxy, ignored_xyxy)
    area = box_area(box_xyxy).unsqueeze(-1)

    # From intersection = iou * union and union = a + b - intersection.
    inter = iou * (area + box_area(ignored_xyxy).unsqueeze(-2)) / (1 + iou)
    covered = inter / area.clamp_min(1e-9) > ON_IGNORED
    inside = _cell_in_box(cell_xy, ignored_xyxy) & truth.ignored.unsqueeze(-1)
    return covered.any(dim=2) | inside.any(dim=1)


def _objectness(
    logits: Tensor, assigned: Tensor, quality: Tensor, counted: Tensor, share: Tensor
) -> Tensor:
    """Return the BCE against the IoU for assigned cells and 0 elsewhere.

    Notes
    -----
    Background is weighted by its own probability squared, as in the focal loss (Lin et al., ICCV
    2017), since there are a hundred times more of it.
    """
    positive = assigned >= 0
    # At least 0.5, so that a cell whose box is still poor does not learn to be silent.
    target = torch.where(positive, 0.5 + 0.5 * quality, torch.zeros_like(quality))
    weight = (
        torch.where(positive, torch.ones_like(quality), logits.detach().sigmoid().square())
        * counted
    )
    bce = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((bce * weight).sum(dim=1) * share).sum()


def _boxes(
    candidates: Candidates, truth: Truth, assigned: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L1, GIoU and cross-entropy of the assigned cells."""
    l1, giou, picture, cell, weight = _matched_boxes(candidates.box_xyxy, truth, assigned, share)
    if candidates.classes.shape[-1] == 0:
        return l1, giou, l1.new_zeros(())
    label = truth.label[picture, assigned[picture, cell]]
    entropy = functional.cross_entropy(
        candidates.classes[picture, cell], label.clamp_min(0), reduction="none"
    )
    # A box of no class is found like any other, and teaches no class.
    return l1, giou, (entropy * weight * (label >= 0)).sum()


def _matched_boxes(
    box_xyxy: Tensor, truth: Truth, assigned: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return L1, GIoU, and image [K], cell [K] and weight [K] of the K assigned cells."""
    picture, cell = torch.nonzero(assigned >= 0, as_tuple=True)
    slot = assigned[picture, cell]
    wanted, got = truth.box_xyxy[picture, slot], box_xyxy[picture, cell]
    # A true box with many cells weighs no more than one with a single cell.
    cells_of_box = torch.zeros_like(truth.mask, dtype=torch.float32).index_put_(
        (picture, slot), torch.ones_like(got[:, 0]), accumulate=True
    )
    weight = share[picture] / cells_of_box[picture, slot]
    l1 = ((got - wanted).abs().sum(dim=1) * weight).sum()
    giou = ((1 - generalized_iou(got, wanted)[0]) * weight).sum()
    return l1, giou, picture, cell, weight
