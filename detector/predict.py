"""From a batch to what a person looks at: slots decoded to scored boxes on the picture itself.

A warehouse holds canvases, not sources: there the picture shown is the canvas without its padding,
and boxes are scaled to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.boxes import canvas_to_source
from detector.evaluate import scores_of
from detector.model import BigDet, TinyDet, to_float
from detector.view import Shown
from utils.training.ranks import to_device

if TYPE_CHECKING:
    from detector.task import DataFacts

__all__ = ["Predictor"]

LEAST_SCORE = 0.01
"""Slots below this are not worth carrying: the page's slider starts above it."""


class Predictor:
    """A detector in eval mode on a device."""

    def __init__(self, model: BigDet | TinyDet, facts: DataFacts, device: torch.device) -> None:
        self.model = model.to(device).eval()
        # The weights in the order of `to_float`'s images, so that no layer reorders either.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # no stub
        self.facts = facts
        self.device = device

    @torch.inference_mode()
    def look(
        self,
        batch: dict[str, Tensor],
        names: Sequence[str],
        pictures: Sequence[NDArray[np.uint8]] | None = None,
    ) -> list[Shown]:
        """What the detector finds. batch: "image" [B, 3, H, W] and "letterbox" [B, 6]; with "box",
        "box_mask", "label" also the truth.

        pictures: the sources, uint8 [h, w, 3] each, to draw on; None: the canvases without their
        padding.
        """
        moved = to_device({"image": batch["image"]}, self.device)
        slots = self.model.slots(self.model(to_float(moved["image"])))
        score, label = (value.cpu() for value in scores_of(slots))
        height, width = batch["image"].shape[2:]
        found = canvas_to_source(slots.box_xyxy.cpu(), batch["letterbox"], (height, width)).numpy()
        truth = (
            canvas_to_source(batch["box"], batch["letterbox"], (height, width)).numpy()
            if "box" in batch
            else None
        )
        shown = []
        for at, name in enumerate(names):
            picture = (
                _without_padding(batch["image"][at], batch["letterbox"][at])
                if pictures is None
                else pictures[at]
            )
            raw_width, raw_height = (float(side) for side in batch["letterbox"][at, 4:6])
            scale = np.array([picture.shape[1] / raw_width, picture.shape[0] / raw_height] * 2)
            order = np.argsort(-score[at].numpy(), kind="stable")
            order = order[score[at].numpy()[order] >= LEAST_SCORE]
            more: dict[str, Any] = {}
            if truth is not None:
                mask = batch["box_mask"][at].numpy()
                more = {
                    "truth_xyxy": truth[at][mask] * scale,
                    "truth_label": batch["label"][at].numpy()[mask].astype(np.int64),
                }
            shown.append(
                Shown(
                    name,
                    picture,
                    found[at][order] * scale,
                    score[at].numpy()[order].astype(np.float64),
                    label[at].numpy()[order],
                    **more,
                )
            )
        return shown


def _without_padding(image: Tensor, letterbox: Tensor) -> NDArray[np.uint8]:
    """The part of a canvas [3, H, W] that shows the picture, uint8 [h, w, 3]."""
    scale_x, scale_y, pad_x, pad_y, raw_width, raw_height = (float(value) for value in letterbox)
    left, top = round(pad_x), round(pad_y)
    inside = image[
        :,
        top : top + max(1, round(raw_height * scale_y)),
        left : left + max(1, round(raw_width * scale_x)),
    ]
    pixels = (
        inside
        if inside.dtype == torch.uint8
        else (inside.float() * 255).round().clamp(0, 255).to(torch.uint8)
    )
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
