"""The detection loss: masked L1 + GIoU on matched boxes, BCE on objectness, cross-entropy on
classes.

Every loss is a sum over pictures, each divided by its own number of boxes, so that a batch's value
does not depend on how pictures are dealt to batches, ranks or accumulation steps. Crowd and
difficult boxes are neither targets nor background: cells that sit on one are left out. BigDet
learns one to one (what is used) and, beside it, one to many (a helper objectness and more box
targets), which speeds up learning and costs nothing later.
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
    box_l1: float = 5.0
    box_giou: float = 2.0
    objectness: float = 1.0
    helper: float = 0.25
    classes: float = 0.5
    spread: int = 8


@dataclass(frozen=True, slots=True)
class Truth:
    """What a batch says. box_xyxy [B, S, 4]; mask bool [B, S]: to be found; ignored bool [B, S]:
    neither target nor background; label int64 [B, S], -1 where there is none; real bool [B]: false
    for a repeat that fills up a rank."""

    box_xyxy: Tensor
    mask: Tensor
    ignored: Tensor
    label: Tensor
    real: Tensor


def make_truth(batch: dict[str, Tensor]) -> Truth:
    """The truth of a loader batch (tensors already on the model's device)."""
    mask, ignored = batch["box_mask"], (batch["box_flags"] & IGNORED) != 0
    real = (
        ~batch["pad"]
        if "pad" in batch
        else torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device)
    )
    return Truth(batch["box"].float(), mask & ~ignored, mask & ignored, batch["label"].long(), real)


def largest_box(truth: Truth) -> Truth:
    """The same truth with at most one box a picture, the largest, in one slot."""
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
    said: Candidates, truth: Truth, weights: LossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the real pictures of BigDet's loss, and its parts (detached sums)."""
    with torch.no_grad():
        targets = _targets(said, truth, weights.spread)
    share = truth.real.float() / truth.mask.sum(dim=1).clamp_min(1)
    one = _objectness(said.objectness, targets.one, targets.quality, targets.counted, share)
    many = _objectness(said.helper, targets.many, targets.quality, targets.counted, share)
    l1, giou, classes = _boxes(said, truth, targets.union, share)
    total = (
        weights.objectness * one
        + weights.helper * many
        + weights.box_l1 * l1
        + weights.box_giou * giou
        + weights.classes * classes
    )
    parts = {"objectness": one, "helper": many, "l1": l1, "giou": giou}
    if said.classes.shape[-1]:
        parts["classes"] = classes
    return total, {name: value.detach() for name, value in parts.items()}


def tiny_loss(said: Vote, truth: Truth, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over the real pictures of TinyDet's loss; `truth` has one slot (see `largest_box`)."""
    here = truth.mask[:, 0] & truth.real
    counted = truth.real & ~truth.ignored[:, 0]
    bce = functional.binary_cross_entropy_with_logits(
        said.objectness[:, 0], truth.mask[:, 0].float(), reduction="none"
    )
    one = (bce * counted).sum()
    # Multiplying by the mask keeps the shapes fixed; a masked slot's box is zeros, never NaN.
    l1 = ((said.box_xyxy[:, 0] - truth.box_xyxy[:, 0]).abs().sum(dim=1) * here).sum()
    giou = ((1 - generalized_iou(said.box_xyxy[:, 0], truth.box_xyxy[:, 0])[0]) * here).sum()
    cells, cell_boxes = _cell_votes(said, truth, here, counted, weights)
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
    said: Vote, truth: Truth, here: Tensor, counted: Tensor, weights: LossWeights
) -> tuple[Tensor, Tensor]:
    """Each cell's own lesson, without which the average over the cells takes ten times as long to
    learn: whether it lies on the box, and if so, what the box is."""
    # The whole box, not its middle: the evidence is at its edges, and the middle alone learned four
    # times as slowly.
    on_box = _cell_in_box(said.cell_xy, truth.box_xyxy)[:, 0] & here.unsqueeze(1)
    share = counted.float() / on_box.sum(dim=1).clamp_min(1)
    assigned = torch.where(on_box, 0, -1)
    cells = _objectness(
        said.cell_logit, assigned, torch.ones_like(said.cell_logit), torch.ones_like(on_box), share
    )
    l1, giou = _matched_boxes(said.cell_box_xyxy, truth, assigned, here.float())[:2]
    return weights.objectness * cells, weights.box_l1 * l1 + weights.box_giou * giou


@dataclass(frozen=True, slots=True)
class _Targets:
    """one, many, union: int64 [B, N], the truth of each cell or -1; quality [B, N]: IoU with it.

    Counted bool [B, N].
    """

    one: Tensor
    many: Tensor
    union: Tensor
    quality: Tensor
    counted: Tensor


def _targets(said: Candidates, truth: Truth, spread: int) -> _Targets:
    pairs = affinity(said.box_xyxy, truth.box_xyxy)
    near = _cell_in_box(said.cell_xy, truth.box_xyxy)
    matched = greedy_match(_prefer_certain(pairs, said.objectness), truth.mask)
    batch, cells = said.objectness.shape
    # Spare column for the truths that got nothing.
    one = torch.full((batch, cells + 1), -1, dtype=torch.int64, device=matched.device)
    order = torch.arange(matched.shape[1], device=matched.device).expand_as(matched)
    one = one.scatter_(1, torch.where(matched >= 0, matched, cells), order)[:, :cells]
    many = spread_match(pairs.masked_fill(~near, NEVER), truth.mask, spread)
    union = torch.where(one >= 0, one, many)
    quality = (
        pairs.gather(1, union.clamp_min(0).unsqueeze(1)).squeeze(1).clamp(0, 1)
        if pairs.shape[1]
        else torch.zeros_like(said.objectness)
    )
    counted = torch.ones_like(said.objectness, dtype=torch.bool)
    if bool(truth.ignored.any()):
        counted = (union >= 0) | ~_on_ignored(said.box_xyxy, said.cell_xy, truth)
    return _Targets(one, many, union, quality, counted)


def _prefer_certain(pairs: Tensor, objectness: Tensor) -> Tensor:
    """IoU, weighted by how certain a cell already is: among cells that box a thing about equally
    well the winner stays the same from step to step, and the others learn to keep silent."""
    certain = objectness.sigmoid().sqrt().unsqueeze(1)
    return torch.where(pairs > 0, pairs * certain, pairs)


def _cell_in_box(cell_xy: Tensor, box_xyxy: Tensor) -> Tensor:
    """bool [B, S, N]: the cell's centre lies in the box."""
    x, y = cell_xy[:, 0], cell_xy[:, 1]
    low_x, low_y, high_x, high_y = (box_xyxy[..., at : at + 1] for at in range(4))
    return (x > low_x) & (x < high_x) & (y > low_y) & (y < high_y)


def _on_ignored(box_xyxy: Tensor, cell_xy: Tensor, truth: Truth) -> Tensor:
    """bool [B, N]: most of the predicted box, or the cell itself, lies on an ignored box."""
    ignored_xyxy = truth.box_xyxy * truth.ignored.unsqueeze(-1)
    iou = pairwise_iou(box_xyxy, ignored_xyxy)
    # intersection = iou * union, and union = a + b - intersection
    inter = (
        iou * (box_area(box_xyxy).unsqueeze(-1) + box_area(ignored_xyxy).unsqueeze(-2)) / (1 + iou)
    )
    covered = inter / box_area(box_xyxy).clamp_min(1e-9).unsqueeze(-1) > ON_IGNORED
    return covered.any(dim=2) | (
        _cell_in_box(cell_xy, ignored_xyxy) & truth.ignored.unsqueeze(-1)
    ).any(dim=1)


def _objectness(
    logits: Tensor, assigned: Tensor, quality: Tensor, counted: Tensor, share: Tensor
) -> Tensor:
    """BCE against the IoU for assigned cells and 0 elsewhere; background is weighted by its own
    probability squared (as in focal loss), since there are a hundred times more of it."""
    positive = assigned >= 0
    target = torch.where(positive, 0.5 + 0.5 * quality, torch.zeros_like(quality))
    weight = (
        torch.where(positive, torch.ones_like(quality), logits.detach().sigmoid().square())
        * counted
    )
    bce = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return ((bce * weight).sum(dim=1) * share).sum()


def _boxes(
    said: Candidates, truth: Truth, assigned: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """L1, GIoU and cross-entropy of the assigned cells."""
    l1, giou, picture, cell, weight = _matched_boxes(said.box_xyxy, truth, assigned, share)
    if said.classes.shape[-1] == 0:
        return l1, giou, l1.new_zeros(())
    label = truth.label[picture, assigned[picture, cell]]
    entropy = functional.cross_entropy(
        said.classes[picture, cell], label.clamp_min(0), reduction="none"
    )
    return l1, giou, (entropy * weight * (label >= 0)).sum()


def _matched_boxes(
    box_xyxy: Tensor, truth: Truth, assigned: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(L1, GIoU, picture [K], cell [K], weight [K]) of the K assigned cells."""
    picture, cell = torch.nonzero(assigned >= 0, as_tuple=True)
    slot = assigned[picture, cell]
    wanted, got = truth.box_xyxy[picture, slot], box_xyxy[picture, cell]
    # A truth with many cells weighs no more than one with a single cell.
    crowd = torch.zeros_like(truth.mask, dtype=torch.float32).index_put_(
        (picture, slot), torch.ones_like(got[:, 0]), accumulate=True
    )
    weight = share[picture] / crowd[picture, slot]
    l1 = ((got - wanted).abs().sum(dim=1) * weight).sum()
    giou = ((1 - generalized_iou(got, wanted)[0]) * weight).sum()
    return l1, giou, picture, cell, weight
