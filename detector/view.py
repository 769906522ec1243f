"""Looking at what a detector does: PNGs with boxes, one self-contained HTML page with a score
slider, the training curve.

Predictions are drawn in one colour, the truth, where known, in another. The page embeds its
pictures and its data; it loads nothing, and its policy forbids it to. Names come from files: they
reach the page as JSON text and are set as text, never as HTML.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from detector.page import PAGE
from warehouse.errors import TrainingError

__all__ = ["Shown", "draw_curve", "draw_overlay", "write_page", "write_view"]

FOUND, TRUTH = (255, 92, 0), (0, 158, 255)
SHOWN_SIDES = (640, 1024)


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture with its boxes, all in pixels of `picture` (uint8 [H, W, 3] RGB).

    box_xyxy [K, 4], score [K] in [0, 1], label [K]: what the detector says, best first; truth_xyxy
    [M, 4], truth_label [M], or None.
    """

    name: str
    picture: NDArray[np.uint8]
    box_xyxy: NDArray[np.float64]
    score: NDArray[np.float64]
    label: NDArray[np.int64]
    truth_xyxy: NDArray[np.float64] | None = None
    truth_label: NDArray[np.int64] | None = None


def fitted(shown: Shown) -> Shown:
    """The same picture and boxes with a longer side between SHOWN_SIDES pixels, so that names can
    be read and pages stay small.
    """
    height, width = shown.picture.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, SHOWN_SIDES[0]), SHOWN_SIDES[1]) / longer
    if scale == 1:
        return shown
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    picture = np.asarray(Image.fromarray(shown.picture).resize(size, how))
    factor = np.array([size[0] / width, size[1] / height] * 2)
    truth = None if shown.truth_xyxy is None else shown.truth_xyxy * factor
    return Shown(
        shown.name,
        picture,
        shown.box_xyxy * factor,
        shown.score,
        shown.label,
        truth,
        shown.truth_label,
    )


def draw_overlay(shown: Shown, class_names: Sequence[str], threshold: float) -> Image.Image:
    """Truth thin and below, predictions of at least `threshold` above, with class and score."""
    image = Image.fromarray(shown.picture).convert("RGB")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(10, image.height // 45))
    if shown.truth_xyxy is not None:
        for box in shown.truth_xyxy:
            pen.rectangle([float(corner) for corner in box], outline=TRUTH, width=2)
    for box, score, label in zip(shown.box_xyxy, shown.score, shown.label, strict=True):
        if score < threshold:
            continue
        left, top, right, bottom = (float(corner) for corner in box)
        pen.rectangle([left, top, max(left, right), max(top, bottom)], outline=FOUND, width=2)
        text = f"{_class_name(class_names, int(label))} {score:.2f}".strip()
        ink = pen.textbbox((left + 2, top + 1), text, font=font)
        pen.rectangle([ink[0] - 2, ink[1] - 1, ink[2] + 2, ink[3] + 1], fill=FOUND)
        pen.text((left + 2, top + 1), text, fill=(0, 0, 0), font=font)
    return image


def write_view(
    pictures: Sequence[Shown],
    class_names: Sequence[str],
    threshold: float,
    folder: Path,
    title: str,
) -> Path:
    """A PNG a picture and index.html in `folder`; the page's path.

    Raises TrainingError when the folder cannot be written.
    """
    small = [fitted(shown) for shown in pictures]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for at, shown in enumerate(small):
            draw_overlay(shown, class_names, threshold).save(
                folder / f"{at:04d}_{_file_name(shown.name)}.png"
            )
        page = folder / "index.html"
        page.write_text(write_page(small, class_names, threshold, title), encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            "the pictures cannot be written",
            where=folder,
            found=error.strerror,
            remedy="choose another --infer.output",
        ) from None
    return page


def write_page(
    pictures: Sequence[Shown], class_names: Sequence[str], threshold: float, title: str
) -> str:
    """One HTML document that needs nothing else.

    Pictures as JPEG data, boxes drawn by score in the browser.
    """
    data = {
        "threshold": threshold,
        "pictures": [_page_entry(shown, class_names) for shown in pictures],
    }
    # "<" cannot end the script element from within a JSON string when it is written as an escape.
    text = (
        json.dumps(data, allow_nan=False, separators=(",", ":"))
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
    )
    return PAGE.replace("{{title}}", html.escape(title)).replace("{{data}}", text)


def _page_entry(shown: Shown, class_names: Sequence[str]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(shown.picture).save(buffer, "JPEG", quality=88)
    height, width = shown.picture.shape[:2]
    found = [
        [
            *(round(float(value), 1) for value in box),
            round(float(score), 4),
            _class_name(class_names, int(label)),
        ]
        for box, score, label in zip(shown.box_xyxy, shown.score, shown.label, strict=True)
    ]
    truth = None
    if shown.truth_xyxy is not None:
        labels = (
            shown.truth_label
            if shown.truth_label is not None
            else np.full(len(shown.truth_xyxy), -1)
        )
        truth = [
            [*(round(float(value), 1) for value in box), _class_name(class_names, int(label))]
            for box, label in zip(shown.truth_xyxy, labels, strict=True)
        ]
    return {
        "name": shown.name,
        "width": width,
        "height": height,
        "found": found,
        "truth": truth,
        "jpeg": base64.b64encode(buffer.getvalue()).decode(),
    }


def _class_name(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if 0 <= label < len(class_names) else ""


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).stem)[:80] or "picture"


def draw_curve(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss (left) and held-out metrics (right) by epoch, as a PNG. history.

    One dict an epoch, as the loop keeps it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    left.plot(
        [row["epoch"] for row in history],
        [row["loss"] for row in history],
        color="0.55",
        label="training loss",
        marker=".",
    )
    left.set(xlabel="epoch", ylabel="training loss (log)", title=title, yscale="log")
    left.grid(alpha=0.3)
    right = left.twinx()
    for name, colour in (("ap50", "C1"), ("map50", "C2"), ("ap", "C0"), ("mean_iou", "C3")):
        rows = [row for row in history if name in row]
        if rows:
            right.plot(
                [row["epoch"] for row in rows],
                [row[name] for row in rows],
                color=colour,
                label=f"{name} {rows[-1][name]:.3f}",
                marker=".",
            )
    right.set(ylabel="held-out metric", ylim=(0, 1))
    handles = [*left.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    labels = [*left.get_legend_handles_labels()[1], *right.get_legend_handles_labels()[1]]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)
