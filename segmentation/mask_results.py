"""Stitch the probabilities of patches, and write PNG masks, sheets, scores and a page of them.

    <folder>/<version>/stitched/<picture>.zarr
                       masks/<picture>.png
                       sheets/<picture>.png
                       index.html
                       scores.json

`version` names the probabilities and the way they were blended. Images are done one at a time. An
image whose stitched group exists is not stitched again: the group appears by a rename, after all of
it is durable. If several processes come at once, one stitches an image and the others wait for it.
Memory holds one band of `segmentation.stitch` and one overview of SIDE pixels.
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
from typing import Any, NamedTuple

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
    "ParentRow",
    "Stitched",
    "parents_of",
    "peak_memory_gb",
    "picture_names",
    "stitch_pictures",
    "stitched_paths",
]

LONGEST_NAME = 150
"""Characters, before a hash and an extension are added."""
WAIT_S = 86_400.0
"""For an image of any size in another process; the lock of a killed process is free at once."""
PATCHES_AT_A_TIME = 16


class ParentRow(NamedTuple):
    """A large image; width and height in pixels."""

    source: str
    split: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Stitched:
    """What was made of a version of patches.

    Attributes
    ----------
    scores
        By split, as of `MaskTally.scores`; `held_out` is val and test together.
    pictures
        A dict for each image: name, split, size, mask, sheet, scores.
    folder
        Of all files.
    """

    scores: dict[str, Any]
    pictures: list[dict[str, Any]]
    folder: Path


def parents_of(patches: Warehouse) -> list[ParentRow]:
    """Return the large images of a version of patches, in stored order."""
    columns = ["source", "split", "raw_width", "raw_height"]
    rows = patches.table(tables.SAMPLES, columns).to_pylist()
    # The patches of an image follow one another; a dict keeps the first of each, in order.
    return list(dict.fromkeys(ParentRow(*(row[key] for key in columns)) for row in rows))


def picture_names(sources: Sequence[str]) -> dict[str, str]:
    """Return a file name for each source: its path without extension, made safe.

    Part of a hash is added where two names would be the same, or a name would be too long.
    """
    names = {source: _safe(str(PurePosixPath(source).with_suffix(""))) for source in sources}
    # Without case: some file systems do not tell a.png from A.png.
    taken = Counter(name.lower() for name in names.values())
    for source, name in names.items():
        if taken[name.lower()] > 1 or len(name) > LONGEST_NAME:
            # Of the whole name of the source, which is unique; a number would depend on the order.
            digest = hashlib.sha256(source.encode()).hexdigest()[:12]
            names[source] = f"{name[-LONGEST_NAME:].lstrip('_.')}-{digest}"
    return names


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_.") or "picture"


def stitched_paths(patches: Warehouse, folder: Path, version: str, blend: Blend) -> dict[str, Path]:
    """Return where the stitched group of each source is or will be.

    Parameters
    ----------
    version
        Of the probabilities.
    """
    names = picture_names([parent.source for parent in parents_of(patches)])
    stitched = folder / f"{version}-{blend}" / "stitched"
    return {source: stitched / f"{name}.zarr" for source, name in names.items()}


def stitch_pictures(
    patches: Warehouse,
    probabilities: Path,
    folder: Path,
    *,
    blend: Blend,
    tolerance: float,
    progress: Callable[[int], None] | None = None,
) -> Stitched:
    """Stitch, score and draw every image of a version of patches.

    Parameters
    ----------
    patches
        Whose manifest says how they were cut and where.
    probabilities
        Folder of their version. It may have been deleted if every image is stitched already.
    folder
        Results go to a folder below it.
    tolerance
        Pixels that a boundary may be off for boundary F1.
    progress
        Called with 1 after each image.
    """
    classes = len(patches.manifest.class_names)
    values = _mask_values(patches)
    paths = stitched_paths(patches, folder, probabilities.name, blend)
    folder = folder / f"{probabilities.name}-{blend}"
    for name in ("stitched", "masks", "sheets"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    totals: dict[str, MaskTally] = {}
    pictures = []
    for parent in parents_of(patches):
        path = paths[parent.source]
        _stitch_once(patches, probabilities, parent, path, blend)
        tally = _score(path, parent, MaskTally(classes, tolerance))
        if tally is not None:
            # One more total over all images that were not trained on.
            parts = (parent.split,) if parent.split == "train" else (parent.split, "held_out")
            for part in parts:
                totals.setdefault(part, MaskTally(classes, tolerance)).merge(tally)
        pictures.append(_show(patches, parent, path, folder, values, tally))
        if progress is not None:
            progress(1)

    scores = {split: tally.scores() for split, tally in sorted(totals.items())}
    write_page(folder / "index.html", pictures, scores, classes)
    about = {"scores": scores, "boundary_tolerance": tolerance, "pictures": pictures}
    durable.write_bytes(folder / "scores.json", json.dumps(about, indent=1).encode())
    return Stitched(scores, pictures, folder)


def _mask_values(patches: Warehouse) -> NDArray[np.uint8]:
    """Return the value of each class in mask files, uint8 [256].

    A class may be declared by several values: the smallest one represents it.
    """
    declared = patches.manifest.recipe["mask_values"]
    values = np.zeros(256, np.uint8)
    for value, index in sorted(declared.items(), key=lambda item: -int(item[0])):
        # Sorted from the largest value, so that the smallest one is written last.
        values[index] = int(value)
    return values


def _stitch_once(
    patches: Warehouse, probabilities: Path, parent: ParentRow, path: Path, blend: Blend
) -> None:
    """Stitch an image unless that is done already, here or in another process."""
    if path.exists():
        return
    settings = patches.manifest.recipe["settings"]
    attributes = {
        "source": parent.source,
        "split": parent.split,
        "probabilities": probabilities.name,
        "patches": patches.version,
        "blend": blend,
    }
    with durable.lock(path.parent.parent / ".lock-stitch", wait_s=WAIT_S):
        # Another process may have stitched it while this one waited for the lock.
        if path.exists():
            return
        stitch(
            patches_of(patches, Warehouse.open(probabilities), parent.source),
            path,
            height=parent.height,
            width=parent.width,
            size=settings["patch_size"],
            overlap=settings["overlap"],
            classes=len(patches.manifest.class_names),
            blend=blend,
            truth=parent.split != PREDICT,
            attributes=attributes,
        )


def _score(path: Path, parent: ParentRow, tally: MaskTally) -> MaskTally | None:
    """Return `tally` with the pixels of a stitched image, or None where there is no truth."""
    group = open_stitched(path)
    truth = group.get("truth")
    if truth is None:
        return None
    tally.add(group["label"].__getitem__, truth.__getitem__, parent.height)
    return tally


def _show(
    patches: Warehouse,
    parent: ParentRow,
    path: Path,
    folder: Path,
    values: NDArray[np.uint8],
    tally: MaskTally | None,
) -> dict[str, Any]:
    """Write the mask and the sheet of a stitched image; return its entry on the page."""
    group = open_stitched(path)
    label, truth = group["label"], group.get("truth")
    mask, sheet = f"masks/{path.stem}.png", f"sheets/{path.stem}.png"
    # A generator, so that one band of the image is in memory.
    bands = (values[band] for band in _bands(label))
    write_mask(folder / mask, bands, parent.width, parent.height)

    # Rounded up, so that neither side of the sheet exceeds SIDE.
    step = -(-max(parent.width, parent.height) // SIDE)
    draw_sheet(
        folder / sheet,
        overview(patches, parent, step),
        _every(label, step),
        None if truth is None else _every(truth, step),
        len(patches.manifest.class_names),
    )
    return {
        "name": parent.source,
        "split": parent.split,
        "size": f"{parent.width} x {parent.height}",
        "mask": mask,
        "sheet": sheet,
        "scores": None if tally is None else tally.scores(),
    }


def overview(patches: Warehouse, parent: ParentRow, step: int) -> NDArray[np.uint8]:
    """Return every `step`-th pixel of a large image, uint8 [h, w, 3].

    It is put together from the patches, PATCHES_AT_A_TIME of them in memory.
    """
    split, first, count = place_of(patches, parent.source)
    settings = patches.manifest.recipe["settings"]
    grid = patch_boxes(parent.width, parent.height, settings["patch_size"], settings["overlap"])
    boxes = [box for _, _, box in grid]
    out = np.zeros((-(-parent.height // step), -(-parent.width // step), 3), np.uint8)
    # With pread: mapped pages would count as memory of the process.
    reader = patches.split(split).reader(access="pread", keep=4)
    for start in range(0, count, PATCHES_AT_A_TIME):
        end = min(start + PATCHES_AT_A_TIME, count)
        indices = np.arange(first + start, first + end)
        images = read_samples(reader, ["image"], indices)["image"]
        for image, (x1, y1, _, _) in zip(images, boxes[start:end], strict=True):
            # The first pixels of the patch that are multiples of the step in the large image.
            skip_y, skip_x = -y1 % step, -x1 % step
            part = np.moveaxis(image[:, skip_y::step, skip_x::step], 0, 2)
            top, left = (y1 + skip_y) // step, (x1 + skip_x) // step
            out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def _bands(array: Any) -> Iterator[NDArray[np.uint8]]:
    """Yield consecutive bands of LINES lines of a Zarr array [y, x]."""
    # The height of a stored chunk: each one is read and decoded once.
    for start in range(0, array.shape[0], LINES):
        yield array[start : start + LINES]


def _every(array: Any, step: int) -> NDArray[np.uint8]:
    """Return every `step`-th pixel of a Zarr array [y, x], read by bands."""
    # A band begins at a line that need not be a multiple of the step; its first lines are skipped.
    rows = [
        band[-number * LINES % step :: step, ::step] for number, band in enumerate(_bands(array))
    ]
    return np.concatenate(rows)


def peak_memory_gb() -> float | None:
    """Return the most memory that this process has held, in 10^9 bytes.

    On Windows, which has no `getrusage`, it is None.
    """
    if sys.platform == "win32":
        return None
    import resource

    # Bytes on macOS, KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
