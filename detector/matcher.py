"""Greedy matching of predictions to true boxes: best IoU first, one to one.

Where nothing overlaps, the smallest distance decides. All pairs are in one affinity, which is the
IoU where two boxes overlap, else minus their distance, so that any overlap goes before none. The
greedy order is found without walking the pairs: a pair that is the best of its row *and* of its
column is what a greedy walk would take too, so each round takes all such pairs at once. Ties go to
the lower true box, then to the lower prediction.

The optimal assignment (Hungarian) was given up: it runs on the CPU, one image at a time, and greedy
matching comes close to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detector.boxes import box_distance, pairwise_iou

__all__ = ["affinity", "greedy_match", "spread_match"]

NEVER = float("-inf")


def affinity(predicted_xyxy: Tensor, truth_xyxy: Tensor) -> Tensor:
    """Return the affinity [B, S, N] of predictions [B, N, 4] and true boxes [B, S, 4].

    It is the IoU in (0, 1] where boxes overlap, else minus the L1 distance of their corners.
    """
    iou = pairwise_iou(truth_xyxy, predicted_xyxy)
    return torch.where(iou > 0, iou, -box_distance(truth_xyxy, predicted_xyxy))


def greedy_match(pair_affinity: Tensor, truth_mask: Tensor) -> Tensor:
    """Return the prediction that each true box gets, highest affinity first.

    Parameters
    ----------
    pair_affinity
        [B, S, N]; -inf for a pair that is not allowed.
    truth_mask
        bool [B, S]: box slots that hold a box.

    Returns
    -------
    Tensor
        int64 [B, S]; -1 where there is no box, or no prediction is left for it. Within an image no
        prediction is given twice.
    """
    batch, truths, predictions = pair_affinity.shape
    matched = torch.full((batch, truths), -1, dtype=torch.int64, device=pair_affinity.device)
    if truths == 0 or predictions == 0:
        return matched
    left = pair_affinity.masked_fill(~truth_mask.unsqueeze(-1), NEVER)
    rows = torch.arange(truths, device=left.device)
    # Each round takes at least one pair a picture, usually most of them: 2-5 rounds for 30 boxes.
    for _ in range(truths):
        value, choice = left.max(dim=2)
        # Row r, column c: how much truth r likes the prediction that truth c chose.
        rivals = left.gather(2, choice.unsqueeze(1).expand(-1, truths, -1))
        taken = (rivals.argmax(dim=1) == rows) & (value > NEVER)
        if not bool(taken.any()):
            break
        matched = torch.where(taken, choice, matched)
        # A truth that loses its round writes nothing: its column is a spare one past the end.
        gone = torch.zeros((batch, predictions + 1), dtype=torch.bool, device=left.device)
        gone.scatter_(1, torch.where(taken, choice, predictions), True)
        left = left.masked_fill(taken.unsqueeze(2) | gone[:, None, :predictions], NEVER)
    return matched


def spread_match(pair_affinity: Tensor, truth_mask: Tensor, count: int) -> Tensor:
    """Return the true box of each prediction, where each box asks for its `count` best ones.

    A prediction that several boxes ask for goes to the one of highest affinity.

    Parameters
    ----------
    pair_affinity
        [B, S, N]; -inf for a pair that is not allowed.
    truth_mask
        bool [B, S]: box slots that hold a box.
    count
        Predictions per box, at most.

    Returns
    -------
    Tensor
        int64 [B, N]: the slot of the box of each prediction, or -1.
    """
    batch, truths, predictions = pair_affinity.shape
    # max and topk refuse an empty dimension.
    if truths == 0 or predictions == 0:
        return torch.full((batch, predictions), -1, dtype=torch.int64, device=pair_affinity.device)
    allowed = pair_affinity.masked_fill(~truth_mask.unsqueeze(-1), NEVER)
    value, choice = allowed.topk(min(count, predictions), dim=2)
    asked = torch.full_like(allowed, NEVER).scatter_(2, choice, value)
    best, truth = asked.max(dim=1)
    return torch.where(best > NEVER, truth, -1)
