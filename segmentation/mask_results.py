"""From patches' probabilities to what is looked at: stitched Zarr, masks as PNG, sheets, scores,
page; a picture at a time.

    <folder>/<version>/stitched/<picture>.zarr   masks/<picture>.png   sheets/<picture>.png   index.html   scores.json

`version` names the probabilities and the way they were blended. A picture whose stitched Zarr is
there is not stitched again: it appears by a rename, after all of it is durable. Of several
processes that come at once one stitches a picture and the others wait for it. Memory: one band of
`segmentation.stitch`, one overview of SIDE pixels.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.mask_jobs import patches_of, place_of
from segmentation.mask_scores import MaskTally
from segmentation.mask_sheet import SIDE, draw_sheet, write_mask, write_page
from segmentation.patches import PREDICT, patch_boxes
from segmentation.stitch import LINES, Blend, open_stitched, stitch
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = [
    "Stitched",
    "parents_of",
    "peak_memory_gb",
    "picture_names",
    "stitch_pictures",
    "stitched_paths",
]

LONGEST_NAME = 150
WAIT_S = 86_400.0
"""For another process's picture, whatever its size; the lock of a killed one is free at once."""


@dataclass(frozen=True, slots=True)
class Stitched:
    """scores: {split: MaskTally.scores()}, `held_out` being val and test together; pictures.

    One dict each; folder: of all files.
    """

    scores: dict[str, Any]
    pictures: list[dict[str, Any]]
    folder: Path


def parents_of(patches: Warehouse) -> list[tuple[str, str, int, int]]:
    """(source, split, width, height) of every parent, in stored order."""
    table = patches.table(
        tables.SAMPLES, ["source", "split", "raw_width", "raw_height"]
    ).to_pylist()
    return list(
        dict.fromkeys(
            (row["source"], row["split"], row["raw_width"], row["raw_height"]) for row in table
        )
    )


def picture_names(sources: Sequence[str]) -> dict[str, str]:
    """source -> a file name of its own: the path without extension.

    With part of a hash where two would be alike, or it were too long.
    """
    short = {source: _safe(str(PurePosixPath(source).with_suffix(""))) for source in sources}
    taken = Counter(name.lower() for name in short.values())
    for source, name in short.items():
        if taken[name.lower()] > 1 or len(name) > LONGEST_NAME:
            short[source] = (
                f"{name[-LONGEST_NAME:].lstrip('_.')}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
            )
    return short


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.") or "picture"


def stitched_paths(patches: Warehouse, folder: Path, version: str, blend: Blend) -> dict[str, Path]:
    """source -> where its stitched Zarr lies or will lie. version: of the probabilities."""
    names = picture_names([source for source, *_ in parents_of(patches)])
    return {
        source: folder / f"{version}-{blend}" / "stitched" / f"{name}.zarr"
        for source, name in names.items()
    }


def stitch_pictures(
    patches: Warehouse,
    probabilities: Path,
    folder: Path,
    *,
    blend: Blend,
    tolerance: float,
    progress: Callable[[int], None] | None = None,
) -> Stitched:
    """Stitch, score and draw every picture of a version of patches.

    probabilities: folder of their version, which need not be there any more where every picture is
    stitched.
    """
    settings, mask_values = (
        patches.manifest.recipe["settings"],
        patches.manifest.recipe["mask_values"],
    )
    classes = len(patches.manifest.class_names)
    # A class may be declared by several values: the smallest stands for it.
    values = np.zeros(256, np.uint8)
    for value, index in sorted(mask_values.items(), key=lambda item: -int(item[0])):
        values[index] = int(value)
    paths = stitched_paths(patches, folder, probabilities.name, blend)
    folder = folder / f"{probabilities.name}-{blend}"
    for name in ("stitched", "masks", "sheets"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    totals: dict[str, MaskTally] = {}
    pictures = []
    for source, split, width, height in parents_of(patches):
        path = paths[source]
        if not path.exists():
            named: dict[str, Any] = {
                "source": source,
                "split": split,
                "probabilities": probabilities.name,
            }
            with durable.lock(folder / ".lock-stitch", wait_s=WAIT_S):
                if not path.exists():
                    stitch(
                        patches_of(patches, Warehouse.open(probabilities), source),
                        path,
                        height=height,
                        width=width,
                        size=settings["patch_size"],
                        overlap=settings["overlap"],
                        classes=classes,
                        blend=blend,
                        truth=split != PREDICT,
                        attributes=named | {"patches": patches.version, "blend": blend},
                    )
        group = open_stitched(path)
        label, truth = group["label"], group.get("truth")
        write_mask(
            folder / "masks" / f"{path.stem}.png",
            (values[band] for band in _bands(label)),
            width,
            height,
        )
        tally = None
        if truth is not None:
            tally = MaskTally(classes, tolerance)
            tally.add(label.__getitem__, truth.__getitem__, height)
            for part in (split, "held_out") if split != "train" else (split,):
                totals.setdefault(part, MaskTally(classes, tolerance)).merge(tally)
        step = -(-max(width, height) // SIDE)
        sheet = folder / "sheets" / f"{path.stem}.png"
        said, known = _every(label, step), None if truth is None else _every(truth, step)
        draw_sheet(sheet, overview(patches, source, width, height, step), said, known, classes)
        pictures.append(
            {
                "name": source,
                "split": split,
                "size": f"{width} x {height}",
                "mask": f"masks/{path.stem}.png",
                "sheet": f"sheets/{sheet.name}",
                "scores": None if tally is None else tally.scores(),
            }
        )
        if progress is not None:
            progress(1)
    scores = {split: tally.scores() for split, tally in sorted(totals.items())}
    write_page(folder / "index.html", pictures, scores, classes)
    about = {"scores": scores, "boundary_tolerance": tolerance, "pictures": pictures}
    durable.write_bytes(folder / "scores.json", json.dumps(about, indent=1).encode())
    return Stitched(scores, pictures, folder)


def overview(
    patches: Warehouse, source: str, width: int, height: int, step: int
) -> NDArray[np.uint8]:
    """Every `step`-th pixel of a parent, uint8 [h, w, 3], put together from its patches 16 at a
    time.
    """
    split, first, count = place_of(patches, source)
    settings = patches.manifest.recipe["settings"]
    boxes = [
        box for _, _, box in patch_boxes(width, height, settings["patch_size"], settings["overlap"])
    ]
    out = np.zeros((-(-height // step), -(-width // step), 3), np.uint8)
    reader = patches.split(split).reader(access="pread", keep=4)
    for start in range(0, count, 16):
        found = read_samples(
            reader, ["image"], np.arange(first + start, first + min(start + 16, count))
        )["image"]
        for image, (x1, y1, _, _) in zip(found, boxes[start : start + 16], strict=True):
            skip_y, skip_x = -y1 % step, -x1 % step
            part = np.moveaxis(image[:, skip_y::step, skip_x::step], 0, 2)
            top, left = (y1 + skip_y) // step, (x1 + skip_x) // step
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def _bands(array: Any) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, array.shape[0], LINES):
        yield array[start : start + LINES]


def _every(array: Any, step: int) -> NDArray[np.uint8]:
    """Every `step`-th pixel of a Zarr array, read by bands."""
    return np.concatenate(
        [band[-at * LINES % step :: step, ::step] for at, band in enumerate(_bands(array))]
    )


def peak_memory_gb() -> float | None:
    """The most memory this process has held, in 10^9 bytes.

    None where the system does not tell (Windows).
    """
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
