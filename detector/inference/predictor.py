"""From a batch to what a person looks at: boxes with scores, in the pixels of the image itself.

A warehouse holds canvases and no source images. The image shown is then the canvas without its
padding, and the boxes are scaled to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.boxes import canvas_to_source
from detector.evaluate import scores_of
from detector.inference.overlay import DetectedImage
from detector.model import BigDet, TinyDet, to_float
from utils.training.ranks import to_device

if TYPE_CHECKING:
    from detector.task import DataFacts

__all__ = ["Predictor"]

LEAST_SCORE = 0.01
"""Box slots below this score are left out: the steps of the page's slider are as wide."""


class Predictor:
    """A detector in evaluation mode on a device.

    Parameters
    ----------
    model
        Moved to `device`.
    facts
        What the model was trained on.
    device
        Where the model runs; batches are moved there.
    """

    def __init__(self, model: BigDet | TinyDet, facts: DataFacts, device: torch.device) -> None:
        self.model = model.to(device).eval()
        # The weights in the order of `to_float`'s images, so that no layer reorders either.
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # no stub
        self.facts = facts
        self.device = device

    @torch.inference_mode()
    def predict(
        self,
        batch: dict[str, Tensor],
        names: Sequence[str],
        pictures: Sequence[NDArray[np.uint8]] | None = None,
    ) -> list[DetectedImage]:
        """Return the images of a batch with the boxes that the detector finds in them.

        Parameters
        ----------
        batch
            `image` [B, 3, H, W] and `letterbox` [B, 6] on the CPU; where it holds `box`,
            `box_mask` and `label` too, the result carries the true boxes.
        names
            Name of each image.
        pictures
            The source images, uint8 [h, w, 3] each, to draw on; None means the canvases without
            their padding.
        """
        moved = to_device({"image": batch["image"]}, self.device)
        slots = self.model.slots(self.model(to_float(moved["image"])))
        score, label = (value.cpu().numpy() for value in scores_of(slots))
        letterbox = batch["letterbox"]
        canvas_hw = (batch["image"].shape[2], batch["image"].shape[3])
        found = canvas_to_source(slots.box_xyxy.cpu(), letterbox, canvas_hw).numpy()
        truth = None
        if "box" in batch:
            truth = canvas_to_source(batch["box"], letterbox, canvas_hw).numpy()

        detected = []
        for at, name in enumerate(names):
            if pictures is None:
                picture = _without_padding(batch["image"][at], letterbox[at])
            else:
                picture = pictures[at]

            # Boxes are in pixels of the source, which a canvas shows at another size.
            raw_width, raw_height = (float(side) for side in letterbox[at, 4:6])
            scale = np.array([picture.shape[1] / raw_width, picture.shape[0] / raw_height] * 2)
            # A stable sort keeps the order of equal scores, and with it the files, from run to run.
            order = np.argsort(-score[at], kind="stable")
            order = order[score[at][order] >= LEAST_SCORE]

            truth_xyxy, truth_label = None, None
            if truth is not None:
                mask = batch["box_mask"][at].numpy()
                truth_xyxy = truth[at][mask] * scale
                truth_label = batch["label"][at].numpy()[mask].astype(np.int64)
            detected.append(
                DetectedImage(
                    name,
                    picture,
                    found[at][order] * scale,
                    score[at][order].astype(np.float64),
                    label[at][order],
                    truth_xyxy,
                    truth_label,
                )
            )
        return detected


def _without_padding(image: Tensor, letterbox: Tensor) -> NDArray[np.uint8]:
    """Return the part of a canvas [3, H, W] that the image covers, as uint8 [h, w, 3]."""
    scale_x, scale_y, pad_x, pad_y, raw_width, raw_height = (float(value) for value in letterbox)
    left, top = round(pad_x), round(pad_y)
    # An extremely narrow image covers less than half a pixel; one row of it is shown all the same.
    height, width = max(1, round(raw_height * scale_y)), max(1, round(raw_width * scale_x))
    inside = image[:, top : top + height, left : left + width]
    if inside.dtype != torch.uint8:
        inside = (inside.float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(inside.permute(1, 2, 0).numpy())
