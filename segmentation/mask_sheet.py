"""Write stitched masks to look at: PNG masks in the mask files' own values, sheets, an HTML page.

A sheet shows an image, the truth, the prediction and the error side by side. Sheets and the page
show at most SIDE pixels of a side, every k-th pixel.

Colours of errors (Okabe and Ito, distinct for colour-blind eyes): vermilion where a class was
predicted that is not there, blue where the rarest class was missed.
"""

from __future__ import annotations

import html
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.format import durable
from warehouse.settings import MASK_PADDING

__all__ = ["SIDE", "draw_curve", "draw_sheet", "write_mask", "write_page"]

SIDE = 512
GAP = 6
"""Pixels between the panels of a sheet."""
WRONG, MISSED, UNKNOWN = (213, 94, 0), (0, 114, 178), (128, 128, 128)
SCORES = {"dice": "Dice", "iou": "IoU", "boundary_f1": "boundary F1"}


def write_mask(path: Path, bands: Iterator[NDArray[np.uint8]], width: int, height: int) -> None:
    """Write a grey 8-bit PNG durably from consecutive bands of lines.

    Parameters
    ----------
    bands
        uint8 [n, width]; `height` lines in all.

    Notes
    -----
    ISO/IEC 15948; each row has filter type 0 (none).
    """
    # Rows are compressed as they come, so that a mask of any size needs little memory; Pillow would
    # need all of it at once.
    squeeze = zlib.compressobj(6)
    with durable.durable(path) as file:
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        file.write(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header))
        for band in bands:
            assert band.shape[1] == width
            rows = np.zeros((len(band), width + 1), np.uint8)
            # The byte before each row is its filter type.
            rows[:, 1:] = band
            data = squeeze.compress(rows.tobytes())
            # The compressor may keep everything for now.
            if data:
                file.write(png_chunk(b"IDAT", data))
        file.write(png_chunk(b"IDAT", squeeze.flush()) + png_chunk(b"IEND", b""))
    durable.fsync_folder(path.parent)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file: length, kind, data, and the CRC over kind and data."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def draw_sheet(
    path: Path,
    picture: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8] | None,
    classes: int,
) -> None:
    """Draw image, truth, prediction and error, or image and prediction where there is no truth.

    Parameters
    ----------
    picture
        uint8 [h, w, 3].
    predicted, truth
        uint8 [h, w].
    """
    from PIL import Image

    panels = [picture, tint(predicted, classes)]
    if truth is not None:
        error = errors(picture, predicted, truth, classes)
        panels = [picture, tint(truth, classes), tint(predicted, classes), error]
    height, width = predicted.shape
    sheet = np.full((height, len(panels) * width + (len(panels) - 1) * GAP, 3), 255, np.uint8)
    for number, panel in enumerate(panels):
        left = number * (width + GAP)
        sheet[:, left : left + width] = panel
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def tint(label: NDArray[np.uint8], classes: int) -> NDArray[np.uint8]:
    """Return classes as greys from black to white, uint8 [h, w, 3]; unknown ones grey between."""
    grey = label.astype(np.float32) * (255 / max(1, classes - 1))
    out = np.repeat(grey.clip(0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    out[label == MASK_PADDING] = UNKNOWN
    return out


def errors(
    picture: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    classes: int,
) -> NDArray[np.uint8]:
    """Return a pale image with wrong pixels coloured, uint8 [h, w, 3]."""
    known = truth != MASK_PADDING
    rarest = int(np.bincount(truth[known], minlength=classes).argmin()) if known.any() else 0
    # Pale, so that both colours of errors stand out.
    out = (picture // 2 + 96).astype(np.uint8)
    wrong = known & (predicted != truth)
    out[wrong] = WRONG
    out[wrong & (truth == rarest)] = MISSED
    return out


def write_page(
    path: Path,
    pictures: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Mapping[str, Any]],
    classes: int,
) -> None:
    """Write one HTML page with a figure for each image.

    Parameters
    ----------
    pictures
        Each with name, split, sheet (a relative path), size, and scores or None.
    totals
        Scores by split.
    """
    columns = [
        (f"{title} {index}", key, str(index))
        for key, title in SCORES.items()
        for index in range(classes)
    ]
    head = "".join(f"<th>{html.escape(title)}</th>" for title, _, _ in columns)
    rows = ""
    for split, scores in totals.items():
        cells = "".join(f"<td>{scores[key][index]:.3f}</td>" for _, key, index in columns)
        rows += f"<tr><th>{html.escape(split)}</th>{cells}</tr>"
    figures = "\n".join(_figure(picture) for picture in pictures)
    # Not str.format: the CSS is full of braces.
    text = PAGE.replace("{{head}}", head).replace("{{rows}}", rows)
    durable.write_bytes(path, text.replace("{{figures}}", figures).encode())


def _figure(picture: Mapping[str, Any]) -> str:
    scores = picture["scores"]
    what, result = "image, prediction", "no truth"
    if scores:
        what = "image, truth, prediction, error"
        result = " · ".join(f"Dice {index}: {value:.3f}" for index, value in scores["dice"].items())
    # Names are those of the user's files, and may hold any characters.
    name = html.escape(f"{picture['name']} ({picture['split']}, {picture['size']})")
    sheet = html.escape(picture["sheet"])
    return (
        f'<figure><img loading="lazy" src="{sheet}" alt="{what} of {name}">'
        f"<figcaption>{name}: {what}. {result}</figcaption></figure>"
    )


def draw_curve(history: Sequence[Mapping[str, Any]], path: Path, classes: int) -> None:
    """Draw training loss (left axis) and held-out Dice (right axis) by epoch as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    # Without pyplot, which would look for a display.
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    epochs, losses = [row["epoch"] for row in history], [row["loss"] for row in history]
    axis.plot(epochs, losses, color="0.55", label="training loss", marker=".")
    axis.set(xlabel="epoch", ylabel="loss", title="U-Net", ylim=(0, None))
    axis.grid(alpha=0.3)
    right = axis.twinx()
    for index in range(classes):
        key = f"dice_{index}"
        # Not every epoch is scored.
        rows = [row for row in history if key in row]
        if rows:
            epochs, dice = [row["epoch"] for row in rows], [row[key] for row in rows]
            label = f"held-out Dice {index}: {dice[-1]:.3f}"
            right.plot(epochs, dice, color=f"C{index}", label=label, marker=".")
    right.set(ylabel="Dice", ylim=(0, 1))
    figure.legend(frameon=False, fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(path)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<title>Stitched masks</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
 padding: .2rem .7rem; text-align: right;
 border-bottom: 1px solid color-mix(in srgb, currentColor 18%, transparent);
}
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
.wrong { color: #d55e00; } .missed { color: #0072b2; }
</style>
</head>
<body>
<h1>Stitched masks</h1>
<p>Error: <b class="wrong">vermilion</b> where a class was predicted that is not there,
<b class="missed">blue</b> where the rarest class was missed. Sheets show every k-th pixel of large
images; the masks beside them are complete.</p>
<table><thead><tr><th>split</th>{{head}}</tr></thead><tbody>{{rows}}</tbody></table>
{{figures}}
</body>
</html>
"""
