"""Average precision in coordinates of the source images, computed by faster-coco-eval.

Boxes are converted back through `letterbox` first, so that a figure does not depend on the canvas.
Crowd and difficult boxes are marked `iscrowd`: finding them is neither right nor wrong. Repeated
samples that fill up a rank are left out. All box slots are predictions, without a score threshold
and without NMS.
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
    """Return the score in [0, 1] and the class of each box slot, both [B, S].

    The score is the objectness times the probability of the likeliest class.
    """
    score = slots.objectness.sigmoid()
    if slots.classes.shape[-1] == 0:
        return score, torch.zeros_like(score, dtype=torch.int64)
    probability, label = slots.classes.softmax(dim=-1).max(dim=-1)
    return score * probability, label


class DetectionTally:
    """Predictions and true boxes, collected batch by batch and scored together.

    Average precision ranks the predictions of all images, so it cannot be averaged over batches.

    Parameters
    ----------
    class_count
        Number of classes; 0 and 1 both mean that classes are not told apart.
    slots
        Box slots per image.
    """

    def __init__(self, class_count: int, slots: int) -> None:
        self.class_count = max(1, class_count)
        self.slots = slots
        self.rows: list[dict[str, NDArray[Any]]] = []

    def add(self, slots: Slots, batch: dict[str, Tensor]) -> None:
        """Add the predictions of a batch.

        Parameters
        ----------
        slots
            What the model found in the batch.
        batch
            The loader's batch, on the same device.
        """
        truth = make_truth(batch)
        hw = (batch["image"].shape[2], batch["image"].shape[3])
        score, label = scores_of(slots)
        found_xyxy = canvas_to_source(slots.box_xyxy, batch["letterbox"], hw)
        truth_xyxy = canvas_to_source(truth.box_xyxy, batch["letterbox"], hw)
        row = {
            "index": batch["index"],
            "real": truth.real,
            "found": found_xyxy,
            "score": score,
            "objectness": slots.objectness.sigmoid(),
            "label": label,
            "truth": truth_xyxy,
            "mask": truth.mask,
            "ignored": truth.ignored,
            "truth_label": truth.label,
            "iou": _largest_iou(slots, truth),
        }
        # NumPy on the CPU: a GPU would fill up with the boxes of a large split.
        self.rows.append({key: value.detach().cpu().numpy() for key, value in row.items()})

    def metrics(self) -> dict[str, float]:
        """Return the scores of everything that was added.

        Returns
        -------
        dict
            `ap50`, class-agnostic and ranked by objectness; `map50` and `ap` (IoU .50:.95), the
            mean over the classes that occur; `mean_iou` of each image's most certain slot and its
            largest box, all in [0, 1] and 0 where there are no true boxes; and the number of
            `pictures`.
        """
        if not self.rows:
            return {"ap50": 0.0, "map50": 0.0, "ap": 0.0, "mean_iou": 0.0, "pictures": 0}

        table = {key: np.concatenate([row[key] for row in self.rows]) for key in self.rows[0]}
        # Ranks pad their shares of a split with samples that another batch may hold too.
        _, first = np.unique(table["index"], return_index=True)
        keep = first[table["real"][first]]
        table = {key: values[keep] for key, values in table.items()}

        agnostic = self._average_precision(table, by_class=False)
        by_class = agnostic
        if self.class_count > 1:
            by_class = self._average_precision(table, by_class=True)
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
        """Return AP at IoU .50:.95 and AP at IoU .50."""
        from faster_coco_eval import COCO, COCOeval_faster

        annotations = _annotations(table, by_class)
        # Without a true box COCO answers -1, which would read as a score.
        if all(row["iscrowd"] for row in annotations):
            return 0.0, 0.0

        pictures = len(table["index"])
        categories = [
            {"id": at, "name": str(at)} for at in range(self.class_count if by_class else 1)
        ]
        ground = {
            "info": {},
            "images": [{"id": at, "width": 1, "height": 1} for at in range(pictures)],
            "categories": categories,
            "annotations": annotations,
        }
        # COCO's classes print what they do.
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(ground)
            evaluation = COCOeval_faster(
                truth, truth.loadRes(_detections(table, by_class)), iouType="bbox"
            )
            # COCO stops at 100 predictions an image; a model may have more box slots.
            evaluation.params.maxDets = [1, 10, max(100, self.slots)]
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluation.evaluate()
            evaluation.accumulate()

        # [IoU, recall, class]. A class without true boxes has precision -1 and no say in the mean.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        seen = (precision > -1).all(axis=(0, 1))
        if not seen.any():
            return 0.0, 0.0
        return float(precision[:, :, seen].mean()), float(precision[0][:, seen].mean())


def _annotations(table: dict[str, NDArray[Any]], by_class: bool) -> list[dict[str, Any]]:
    """Return the true boxes as COCO's annotations."""
    picture, slot = np.nonzero(table["mask"] | table["ignored"])
    corners, crowd = table["truth"][picture, slot], table["ignored"][picture, slot]
    label = np.zeros(len(picture), np.int64)
    if by_class:
        # COCO has no annotation without a class; a box that has none counts as class 0.
        label = np.maximum(table["truth_label"][picture, slot], 0)
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
            # From 1, since COCO's matching marks "no match" by 0.
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
    """Return rows [K, 7] of image, x, y, width, height, score and class."""
    pictures, slots = table["score"].shape
    corners = table["found"].reshape(-1, 4)
    score = table["score" if by_class else "objectness"].reshape(-1)
    label = table["label"].reshape(-1) if by_class else np.zeros(pictures * slots)
    picture = np.repeat(np.arange(pictures), slots)
    return np.column_stack(
        [picture, corners[:, :2], corners[:, 2:] - corners[:, :2], score, label]
    ).astype(np.float64)


def _largest_iou(slots: Slots, truth: Truth) -> Tensor:
    """Return [B], the IoU of each image's first slot with its largest box, on the canvas."""
    largest = largest_box(truth)
    return generalized_iou(slots.box_xyxy[:, 0], largest.box_xyxy[:, 0])[1]
