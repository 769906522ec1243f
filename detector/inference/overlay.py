"""An image with the boxes that a detector found in it, and the drawing of both as one image.

Predictions are drawn in one colour and the true boxes, where they are known, in another. The same
two colours stand in `page.html`, whose script draws the boxes again for every threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["FOUND", "TRUTH", "DetectedImage", "class_name", "draw_overlay", "fit_for_display"]

FOUND, TRUTH = (255, 92, 0), (0, 158, 255)
SHOWN_SIDES = (640, 1024)
"""Least and greatest longer side of the images shown, in pixels."""


@dataclass(frozen=True, slots=True)
class DetectedImage:
    """One image with its boxes, all in pixels of `picture`.

    Attributes
    ----------
    name
        Name of the source file; it may hold any character.
    picture
        uint8 [H, W, 3], RGB.
    box_xyxy, score, label
        What the detector found, best first: float [K, 4] corners, float [K] in [0, 1], and
        int [K] indices into the class names.
    truth_xyxy, truth_label
        The true boxes, float [M, 4], and their classes, int [M]; None where they are not known.
    """

    name: str
    picture: NDArray[np.uint8]
    box_xyxy: NDArray[np.float64]
    score: NDArray[np.float64]
    label: NDArray[np.int64]
    truth_xyxy: NDArray[np.float64] | None = None
    truth_label: NDArray[np.int64] | None = None


def fit_for_display(detected: DetectedImage) -> DetectedImage:
    """Return the image and its boxes resized to a longer side of 640 to 1,024 pixels.

    Class names stay legible on small images, and a page of large ones stays small.
    """
    height, width = detected.picture.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, SHOWN_SIDES[0]), SHOWN_SIDES[1]) / longer
    if scale == 1:
        return detected

    # One side of an extremely narrow image would round to zero, which Pillow refuses.
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    picture = np.asarray(Image.fromarray(detected.picture).resize(size, resampling))

    # The factor of the sides after rounding, so that boxes fit the pixels exactly.
    factor = np.array([size[0] / width, size[1] / height] * 2)
    truth = None if detected.truth_xyxy is None else detected.truth_xyxy * factor
    return DetectedImage(
        detected.name,
        picture,
        detected.box_xyxy * factor,
        detected.score,
        detected.label,
        truth,
        detected.truth_label,
    )


def draw_overlay(
    detected: DetectedImage, class_names: Sequence[str], threshold: float
) -> Image.Image:
    """Return the image with its true boxes and, above them, what scores at least `threshold`.

    Each predicted box carries its class name and score.
    """
    image = Image.fromarray(detected.picture).convert("RGB")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, image.height // 45))

    if detected.truth_xyxy is not None:
        for box in detected.truth_xyxy:
            pen.rectangle([float(corner) for corner in box], outline=TRUTH, width=2)

    for box, score, label in zip(detected.box_xyxy, detected.score, detected.label, strict=True):
        if score < threshold:
            continue
        left, top, right, bottom = (float(corner) for corner in box)
        # Reversed boxes are legal in this package (see `detector.boxes`), but Pillow refuses them.
        pen.rectangle([left, top, max(left, right), max(top, bottom)], outline=FOUND, width=2)
        text = f"{class_name(class_names, int(label))} {score:.2f}".strip()
        ink = pen.textbbox((left + 2, top + 1), text, font=font)
        pen.rectangle([ink[0] - 2, ink[1] - 1, ink[2] + 2, ink[3] + 1], fill=FOUND)
        pen.text((left + 2, top + 1), text, fill=(0, 0, 0), font=font)
    return image


def class_name(class_names: Sequence[str], label: int) -> str:
    """Return the name of a class; the empty string where the label has none, such as -1."""
    return class_names[label] if 0 <= label < len(class_names) else ""
