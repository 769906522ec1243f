"""Average precision on source-picture coordinates, by faster-coco-eval called directly.

Boxes travel back through `letterbox` first, so a figure does not depend on the canvas. Crowd and
difficult boxes are marked `iscrowd`: finding them is neither right nor wrong. Repeats that fill up
a rank are left out. The predictions are the slots, all of them: no score threshold and no NMS.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.boxes import canvas_to_source, generalized_iou
from detector.losses import Truth, largest_box, make_truth
from detector.model import Slots

__all__ = ["DetectionTally", "scores_of"]


def scores_of(slots: Slots) -> tuple[Tensor, Tensor]:
    """Score in [0, 1] and class of each slot, [B, S] each.

    Objectness times the probability of the likeliest class.
    """
    score = slots.objectness.sigmoid()
    if slots.classes.shape[-1] == 0:
        return score, torch.zeros_like(score, dtype=torch.int64)
    probability, label = slots.classes.softmax(dim=-1).max(dim=-1)
    return score * probability, label


class DetectionTally:
    """Collects slots and truth batch by batch; `metrics()` scores them.

    Several tallies (ranks) merge by `rows`.
    """

    def __init__(self, class_count: int, slots: int) -> None:
        self.class_count, self.slots = max(1, class_count), slots
        self.rows: list[dict[str, NDArray[Any]]] = []

    def add(self, slots: Slots, batch: dict[str, Tensor]) -> None:
        """slots: the model's, for this batch; batch: a loader batch on the same device."""
        truth, hw = make_truth(batch), (batch["image"].shape[2], batch["image"].shape[3])
        score, label = scores_of(slots)
        said_xyxy = canvas_to_source(slots.box_xyxy, batch["letterbox"], hw)
        truth_xyxy = canvas_to_source(truth.box_xyxy, batch["letterbox"], hw)
        row = {
            "index": batch["index"],
            "real": truth.real,
            "said": said_xyxy,
            "score": score,
            "objectness": slots.objectness.sigmoid(),
            "label": label,
            "truth": truth_xyxy,
            "mask": truth.mask,
            "ignored": truth.ignored,
            "truth_label": truth.label,
            "iou": _largest_iou(slots, truth),
        }
        self.rows.append({key: value.detach().cpu().numpy() for key, value in row.items()})

    def metrics(self) -> dict[str, float]:
        """`ap50` class-agnostic, by objectness; `map50` and `ap` (IoU .50:.95) mean over the
        classes that occur; `mean_iou` of each picture's best slot with its largest box; `pictures`.
        All in [0, 1]; 0 where there is no truth at all."""
        table = (
            {key: np.concatenate([row[key] for row in self.rows]) for key in self.rows[0]}
            if self.rows
            else {}
        )
        if not table:
            return {"ap50": 0.0, "map50": 0.0, "ap": 0.0, "mean_iou": 0.0, "pictures": 0}
        _, first = np.unique(table["index"], return_index=True)
        keep = first[table["real"][first]]
        table = {key: values[keep] for key, values in table.items()}
        agnostic = self._average_precision(table, by_class=False)
        by_class = (
            agnostic if self.class_count == 1 else self._average_precision(table, by_class=True)
        )
        single = table["iou"][table["mask"].any(axis=1)]
        return {
            "ap50": agnostic[1],
            "map50": by_class[1],
            "ap": by_class[0],
            "mean_iou": float(single.mean()) if single.size else 0.0,
            "pictures": len(keep),
        }

    def _average_precision(
        self, table: dict[str, NDArray[Any]], *, by_class: bool
    ) -> tuple[float, float]:
        """(AP .50:.95, AP .50)."""
        from faster_coco_eval import COCO, COCOeval_faster

        pictures = len(table["index"])
        categories = [
            {"id": at, "name": str(at)} for at in range(self.class_count if by_class else 1)
        ]
        annotations = _annotations(table, by_class)
        if all(row["iscrowd"] for row in annotations):
            return 0.0, 0.0

        ground = {
            "info": {},
            "images": [{"id": at, "width": 1, "height": 1} for at in range(pictures)],
            "categories": categories,
            "annotations": annotations,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(ground)
            evaluation = COCOeval_faster(
                truth, truth.loadRes(_detections(table, by_class)), iouType="bbox"
            )
            evaluation.params.maxDets = [1, 10, max(100, self.slots)]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [iou, recall, class]
        seen = (precision > -1).all(axis=(0, 1))
        return (
            (float(precision[:, :, seen].mean()), float(precision[0][:, seen].mean()))
            if seen.any()
            else (0.0, 0.0)
        )


def _annotations(table: dict[str, NDArray[Any]], by_class: bool) -> list[dict[str, Any]]:
    picture, slot = np.nonzero(table["mask"] | table["ignored"])
    corners, crowd = table["truth"][picture, slot], table["ignored"][picture, slot]
    label = (
        np.maximum(table["truth_label"][picture, slot], 0)
        if by_class
        else np.zeros(len(picture), np.int64)
    )
    size = corners[:, 2:] - corners[:, :2]
    rows = zip(
        picture.tolist(),
        label.tolist(),
        np.concatenate([corners[:, :2], size], axis=1).tolist(),
        size.prod(axis=1).tolist(),
        crowd.tolist(),
        strict=True,
    )
    return [
        {
            "id": at + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(ignored),
        }
        for at, (image, category, box, area, ignored) in enumerate(rows)
    ]


def _detections(table: dict[str, NDArray[Any]], by_class: bool) -> NDArray[np.float64]:
    """[K, 7] rows of (picture, x, y, width, height, score, class)."""
    pictures, slots = table["score"].shape
    corners = table["said"].reshape(-1, 4)
    score = table["score" if by_class else "objectness"].reshape(-1)
    label = table["label"].reshape(-1) if by_class else np.zeros(pictures * slots)
    picture = np.repeat(np.arange(pictures), slots)
    return np.column_stack(
        [picture, corners[:, :2], corners[:, 2:] - corners[:, :2], score, label]
    ).astype(np.float64)


def _largest_iou(slots: Slots, truth: Truth) -> Tensor:
    """[B]: IoU of each picture's first slot with its largest box, on the canvas."""
    largest = largest_box(truth)
    return generalized_iou(slots.box_xyxy[:, 0], largest.box_xyxy[:, 0])[1]
