"""What people look at.

A version's numbers as text, and a contact sheet of its pictures with boxes drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import BuildError
from warehouse.format import durable
from warehouse.format.schema import IGNORED
from warehouse.inspect.cube_report import cube_lines, cube_sheet, cube_tables
from warehouse.read.memory import read_samples
from warehouse.read.version import ChunkReader, Split, Warehouse
from warehouse.settings import InspectSettings

__all__ = [
    "contact_sheet",
    "manifest_tables",
    "rejected_lines",
    "summary_lines",
    "write_contact_sheet",
]

PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#bfef45",
    "#fabed4",
    "#469990",
    "#dcbeff",
    "#9a6324",
)
BACKGROUND, INK = "#202124", "#e8eaed"


def summary_lines(summary: dict[str, Any]) -> Iterable[str]:
    """The log's few lines on what a build holds."""
    if "shape" in summary:
        yield from cube_lines(summary)
        return
    for name, part in (*summary["splits"].items(), ("all", summary["all"])):
        per = part["boxes_per_picture"]
        dropped = (
            ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items()) or "none"
        )
        boxes = (
            f"{part['boxes']} boxes ({per['min']}-{per['max']}, mean {per['mean']:.1f} a picture)"
        )
        yield f"{name}: {part['pictures']} pictures, {boxes}; {part['empty']} empty, {part['clipped']} clipped, dropped {dropped}"


def rejected_lines(rejected: Sequence[dict[str, Any]], most: int = 10) -> Iterable[str]:
    for line in rejected[:most]:
        yield f"refused {line['kind']} {line['path']}: {line['reason']} {line['detail']}".rstrip()
    if len(rejected) > most:
        yield f"... and {len(rejected) - most} more lines in rejected.jsonl"


def manifest_tables(warehouse: Warehouse) -> Iterable[Any]:
    """rich tables: the version, its arrays, its summaries."""
    from rich.table import Table

    if warehouse.cube is not None:
        yield from cube_tables(warehouse)
        return
    manifest = warehouse.manifest
    head = Table(title=f"version {manifest.version}", show_header=False)
    for key, value in (
        ("digest", manifest.digest),
        ("format", manifest.recipe.get("format")),
        ("found / kept / rejected", f"{manifest.found} / {manifest.kept} / {manifest.rejected}"),
        ("classes", ", ".join(manifest.class_names) or "none"),
        ("code", manifest.recipe.get("code_version")),
        (
            "settings",
            ", ".join(
                f"{key}={value}" for key, value in manifest.recipe.get("settings", {}).items()
            ),
        ),
    ):
        head.add_row(key, str(value))
    yield head
    arrays = Table("array", "dtype", "sample", "dimensions", "stored as", title="arrays")
    for name, raw in manifest.arrays.items():
        codec = raw["codec"]["cname"] or "uncompressed"
        arrays.add_row(
            name,
            raw["dtype"],
            str(raw["row"]),
            ", ".join(raw["dims"]),
            f"{codec}, one sample an inner chunk" if raw["sharded"] else codec,
        )
    yield arrays
    if "all" not in manifest.summary:
        counts = Table("split", "samples", title="splits")
        for name, info in manifest.splits.items():
            counts.add_row(name, str(info["samples"]))
        yield counts
        return
    splits = Table(
        "scope",
        "pictures",
        "boxes",
        "a picture",
        "size p50 px",
        "empty",
        "clipped",
        "dropped",
        "duplicates",
        title="summary",
    )
    for name, part in (
        ("all", manifest.summary["all"]),
        *manifest.summary["splits"].items(),
        *((f"{key}/", value) for key, value in manifest.summary["folders"].items()),
    ):
        per = part["boxes_per_picture"]
        splits.add_row(
            name,
            *map(
                str,
                (
                    part["pictures"],
                    part["boxes"],
                    f"{per['min']}-{per['max']}, {per['mean']}",
                    part["box_size_px"].get("p50", "-"),
                    part["empty"],
                    part["clipped"],
                    sum(part["dropped"].values()),
                    part["duplicates"],
                ),
            ),
        )
    yield splits
    if manifest.class_names:
        classes = Table("class", *manifest.splits, title="boxes of each class")
        for name in manifest.class_names:
            classes.add_row(
                name,
                *(
                    str(manifest.summary["splits"][split]["per_class"][name])
                    for split in manifest.splits
                ),
            )
        yield classes


def contact_sheet(split: Split, pictures: int = 24, *, tile: int = 256) -> Any:
    """A PIL picture.

    Evenly spread samples with their boxes (crowd and difficult ones grey) and class names.
    """
    from PIL import Image, ImageDraw

    chosen = np.unique(np.linspace(0, len(split) - 1, min(pictures, len(split))).astype(int))
    columns = min(6, len(chosen))
    height, width = split.specs["image"].shape[2:]
    scale = tile / max(height, width)
    cell_w, cell_h = round(width * scale) + 8, round(height * scale) + 22
    names = split.class_names
    rows = -(-len(chosen) // columns)
    sheet = Image.new(
        "RGB", (columns * cell_w + 8, rows * cell_h + 30 + 18 * bool(names)), BACKGROUND
    )
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (10, 8),
        f"{split.warehouse.version} / {split.name}: {len(split)} pictures, every {max(1, len(split) // len(chosen))}th",
        fill=INK,
    )
    for at, name in enumerate(names[:12]):
        draw.rectangle((10 + at * 110, 27, 17 + at * 110, 34), fill=PALETTE[at % len(PALETTE)])
        draw.text((22 + at * 110, 25), name[:14], fill=INK)
    reader = split.reader(keep=4)
    for at, index in enumerate(chosen.tolist()):
        left, top = 8 + at % columns * cell_w, 30 + 18 * bool(names) + at // columns * cell_h
        picture, boxes, labels, flags = _sample(reader, index)
        tile_picture = Image.fromarray(picture).resize((cell_w - 8, cell_h - 22))
        _draw_boxes(tile_picture, boxes, labels, flags)
        sheet.paste(tile_picture, (left, top))
        draw.text((left, top + cell_h - 20), f"#{index}  {len(boxes)} boxes", fill=INK)
    reader.close()
    return sheet


def _sample(
    reader: ChunkReader, index: int
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(uint8 HWC, boxes xyxy in [0, 1], labels, flags) of one sample."""
    names = ["image", "box_mask", "box", "label", "box_flags"]
    picture, mask, *rest = (
        array[0] for array in read_samples(reader, names, np.array([index])).values()
    )
    if picture.dtype != np.uint8:
        picture = (picture.astype(np.float32) * 255).round().astype(np.uint8)
    boxes, labels, flags = (array[mask] for array in rest)
    return np.ascontiguousarray(picture.transpose(1, 2, 0)), boxes, labels, flags


def _draw_boxes(
    picture: Any, boxes: NDArray[Any], labels: NDArray[Any], flags: NDArray[Any]
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    for box, label, flag in zip(boxes, labels.tolist(), flags.tolist(), strict=True):
        x0, y0, x1, y1 = (
            box * [picture.width, picture.height, picture.width, picture.height]
        ).tolist()
        colour = "#9aa0a6" if flag & IGNORED else PALETTE[max(label, 0) % len(PALETTE)]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)


def write_contact_sheet(warehouse: Warehouse, settings: InspectSettings) -> Path | None:
    """Draw and save the sheet (of a cube: features over time); its path, None where there is
    nothing to draw (codes, features).

    Raises StoreError for an unknown split, BuildError when it cannot be written.
    """
    import io

    split = warehouse.split(settings.split or warehouse.splits[0])
    if "image" not in split.specs and warehouse.cube is None:
        return None
    path = Path(settings.output or f"artifacts/inspect/{warehouse.version}_{split.name}.png")
    buffer = io.BytesIO()
    sheet = (
        cube_sheet(warehouse, settings.pictures)
        if warehouse.cube is not None
        else contact_sheet(split, settings.pictures)
    )
    sheet.save(buffer, "PNG")
    try:
        durable.write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise BuildError(
            "the contact sheet cannot be written",
            where=path,
            found=error.strerror,
            remedy="choose another --inspect.output",
        ) from None
    return path
