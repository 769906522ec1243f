"""The images of `infer_view` on disk: a PNG file for each and one self-contained HTML page.

The page embeds its images and its data. It works from disk and offline, since it loads nothing,
and its content security policy forbids it to. Names come from files: they reach the page as JSON
text and are set as text, never as HTML.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detector.inference.overlay import DetectedImage, class_name, draw_overlay, fit_for_display
from warehouse.errors import TrainingError

__all__ = ["write_page", "write_view"]

TEMPLATE = "page.html"
"""A file beside this one with two gaps: `{{title}}`, escaped HTML, and `{{data}}`, JSON."""


def write_view(
    pictures: Sequence[DetectedImage],
    class_names: Sequence[str],
    threshold: float,
    folder: Path,
    title: str,
) -> Path:
    """Write a PNG file for each image and `index.html` into `folder`.

    Parameters
    ----------
    pictures
        The images with their boxes; large and small ones are resized for display.
    class_names
        Names of the classes, by label.
    threshold
        Least score in [0, 1] of the boxes in the PNG files, and where the page's slider starts.
    folder
        Made where it is missing.
    title
        Title and heading of the page.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    TrainingError
        When the folder cannot be written.
    """
    fitted = [fit_for_display(detected) for detected in pictures]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, detected in enumerate(fitted):
            # Files of one name in different folders are told apart by the number.
            file_name = f"{number:04d}_{_file_name(detected.name)}.png"
            draw_overlay(detected, class_names, threshold).save(folder / file_name)

        page = folder / "index.html"
        page.write_text(write_page(fitted, class_names, threshold, title), encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            "the pictures cannot be written",
            where=folder,
            found=error.strerror,
            remedy="choose another --infer.output",
        ) from None
    return page


def write_page(
    pictures: Sequence[DetectedImage], class_names: Sequence[str], threshold: float, title: str
) -> str:
    """Return one HTML document that needs no other file.

    It holds the images as JPEG data and every box; the browser draws those that score enough.
    """
    data = {
        "threshold": threshold,
        "pictures": [_page_entry(detected, class_names) for detected in pictures],
    }
    # "</script>" in a file name would end the element that holds the JSON, so "<" becomes an
    # escape. U+2028 is legal in JSON and a line break to older JavaScript.
    text = (
        json.dumps(data, allow_nan=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
    )
    template = resources.files("detector.inference").joinpath(TEMPLATE).read_text(encoding="utf-8")

    # The data last: a file called "{{title}}" must not be filled in.
    return template.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def _page_entry(detected: DetectedImage, class_names: Sequence[str]) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(detected.picture).save(buffer, "JPEG", quality=88)
    height, width = detected.picture.shape[:2]
    found = [
        [*_corners(box), round(float(score), 4), class_name(class_names, int(label))]
        for box, score, label in zip(detected.box_xyxy, detected.score, detected.label, strict=True)
    ]
    return {
        "name": detected.name,
        "width": width,
        "height": height,
        "found": found,
        "truth": _truth_entry(detected, class_names),
        "jpeg": base64.b64encode(buffer.getvalue()).decode(),
    }


def _truth_entry(
    detected: DetectedImage, class_names: Sequence[str]
) -> list[list[float | str]] | None:
    """Return [left, top, right, bottom, class name] of each true box; None where none are known."""
    if detected.truth_xyxy is None:
        return None
    labels = detected.truth_label
    if labels is None:
        labels = np.full(len(detected.truth_xyxy), -1)
    return [
        [*_corners(box), class_name(class_names, int(label))]
        for box, label in zip(detected.truth_xyxy, labels, strict=True)
    ]


def _corners(box_xyxy: NDArray[np.float64]) -> list[float]:
    # A tenth of a pixel cannot be seen; more digits would only make the page larger.
    return [round(float(value), 1) for value in box_xyxy]


def _file_name(name: str) -> str:
    """Return the stem of a source's name with only characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem)[:80] or "picture"
