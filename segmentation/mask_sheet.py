"""Stitched masks to look at: PNG files in the mask files' own values, sheets of picture, truth,
prediction and error, one page.

PNG rows are compressed as they come, so that a mask of any size leaves in little memory (Pillow
would want it whole). Sheets and the page show at most SIDE pixels of a side, every k-th pixel.
Colours of errors (Okabe and Ito, safe for colour-blind eyes): vermilion where a class was said that
is not there, blue where the rarer class was missed.
"""

from __future__ import annotations

import html
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.format import durable
from warehouse.settings import MASK_PADDING

__all__ = ["draw_curve", "draw_sheet", "write_mask", "write_page"]

SIDE = 512
GAP = 6
WRONG, MISSED, UNKNOWN = (213, 94, 0), (0, 114, 178), (128, 128, 128)


def write_mask(path: Path, bands: Iterator[NDArray[np.uint8]], width: int, height: int) -> None:
    """A grey 8 bit PNG from consecutive uint8 [n, width] bands, durable (ISO/IEC 15948.

    Every row unfiltered).
    """
    squeeze = zlib.compressobj(6)
    with durable.durable(path) as file:
        file.write(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        )
        for band in bands:
            assert band.shape[1] == width
            rows = np.zeros((len(band), width + 1), np.uint8)
            rows[:, 1:] = band
            data = squeeze.compress(rows.tobytes())
            if data:
                file.write(chunk(b"IDAT", data))
        file.write(chunk(b"IDAT", squeeze.flush()) + chunk(b"IEND", b""))
    durable.fsync_folder(path.parent)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def draw_sheet(
    path: Path,
    picture: NDArray[np.uint8],
    said: NDArray[np.uint8],
    truth: NDArray[np.uint8] | None,
    classes: int,
) -> None:
    """picture | truth | prediction | error; picture | prediction without a truth. picture.

    Uint8 [h, w, 3]; said, truth: uint8 [h, w].
    """
    from PIL import Image

    panels = [picture, tint(said, classes)]
    if truth is not None:
        panels = [
            picture,
            tint(truth, classes),
            tint(said, classes),
            errors(picture, said, truth, classes),
        ]
    height, width = said.shape
    sheet = np.full((height, len(panels) * width + (len(panels) - 1) * GAP, 3), 255, np.uint8)
    for at, panel in enumerate(panels):
        sheet[:, at * (width + GAP) : at * (width + GAP) + width] = panel
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def tint(label: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """Classes as greys from black to white, unknown pixels in between as a hue of their own."""
    out = np.repeat(
        (label.astype(np.float32) * (255 / max(1, classes - 1)))
        .clip(0, 255)
        .astype(np.uint8)[:, :, None],
        3,
        axis=2,
    )
    out[label == MASK_PADDING] = UNKNOWN
    return out


def errors(
    picture: NDArray[np.uint8], said: NDArray[np.uint8], truth: NDArray[np.uint8], classes: int
) -> NDArray[np.uint8]:
    known = truth != MASK_PADDING
    rarest = int(np.bincount(truth[known], minlength=classes).argmin()) if known.any() else 0
    out = (picture // 2 + 96).astype(np.uint8)
    wrong = known & (said != truth)
    out[wrong] = WRONG
    out[wrong & (truth == rarest)] = MISSED
    return out


def write_page(
    path: Path, pictures: Sequence[dict[str, Any]], totals: dict[str, Any], classes: int
) -> None:
    """One HTML page, a figure a picture. pictures.

    Name, split, sheet (relative path), size, scores or None; totals: {split: scores}.
    """
    columns = [
        (f"{name} {index}", key, str(index))
        for key, name in (("dice", "Dice"), ("iou", "IoU"), ("boundary_f1", "boundary F1"))
        for index in range(classes)
    ]
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in columns)
    rows = ""
    for split, scores in totals.items():
        cells = "".join(f"<td>{scores[key][index]:.3f}</td>" for _, key, index in columns)
        rows += f"<tr><th>{html.escape(split)}</th>{cells}</tr>"
    figures = []
    for picture in pictures:
        scores = picture["scores"]
        said = (
            " · ".join(f"Dice {index}: {value:.3f}" for index, value in scores["dice"].items())
            if scores
            else "no truth"
        )
        what = "picture, truth, prediction, error" if scores else "picture, prediction"
        name = html.escape(f"{picture['name']} ({picture['split']}, {picture['size']})")
        figures.append(
            f'<figure><img loading="lazy" src="{html.escape(picture["sheet"])}" alt="{what} of {name}">'
            f"<figcaption>{name}: {what}. {said}</figcaption></figure>"
        )
    text = (
        PAGE.replace("{{head}}", head)
        .replace("{{rows}}", rows)
        .replace("{{figures}}", "\n".join(figures))
    )
    durable.write_bytes(path, text.encode())


def draw_curve(history: Sequence[dict[str, Any]], path: Path, classes: int) -> None:
    """Training loss (left axis) and held-out Dice of each class (right axis) by epoch, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot(
        [row["epoch"] for row in history],
        [row["loss"] for row in history],
        color="0.55",
        label="training loss",
        marker=".",
    )
    axis.set(xlabel="epoch", ylabel="loss", title="U-Net", ylim=(0, None))
    axis.grid(alpha=0.3)
    right = axis.twinx()
    for index in range(classes):
        rows = [row for row in history if f"dice_{index}" in row]
        if rows:
            label = f"held-out Dice {index}: {rows[-1][f'dice_{index}']:.3f}"
            right.plot(
                [row["epoch"] for row in rows],
                [row[f"dice_{index}"] for row in rows],
                color=f"C{index}",
                label=label,
                marker=".",
            )
    right.set(ylabel="Dice", ylim=(0, 1))
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(path)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<title>Stitched masks</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent); }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.wrong { color: #d55e00; } .missed { color: #0072b2; }
</style>
</head>
<body>
<h1>Stitched masks</h1>
<p>Error: <b class="wrong">vermilion</b> where a class was said that is not there, <b class="missed">blue</b> where the rarer class was
missed. Sheets show every k-th pixel of large pictures; the masks beside them are whole.</p>
<table><thead><tr><th>split</th>{{head}}</tr></thead><tbody>{{rows}}</tbody></table>
{{figures}}
</body>
</html>
"""
