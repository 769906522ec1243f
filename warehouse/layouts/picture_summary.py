"""Counts of a version of pictures: for each split, each source folder and in all.

People look at them before they train. They are made from the scanned sources, before anything is
baked, so that a dry run shows them too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.format.manifest import Manifest
from warehouse.layouts.tables import TextTable
from warehouse.settings import SPLIT_NAMES

__all__ = [
    "PictureFacts",
    "picture_lines",
    "picture_tables",
    "summarise",
    "summarise_by",
    "summary_table",
]

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a summary needs to know of one kept picture.

    Attributes
    ----------
    box_sizes_px
        Square root of each box's area on the canvas, in pixels.
    target
        Class of the picture, for sources that give each picture one.
    """

    split: str
    folder: str
    labels: NDArray[np.int16]
    box_sizes_px: NDArray[np.float64]
    clipped: int = 0
    duplicates: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    target: int | None = None


def summarise(pictures: Sequence[PictureFacts], class_names: Sequence[str]) -> dict[str, Any]:
    """One summary over the given pictures; keys as in the manifest."""
    counts = np.array([len(picture.labels) for picture in pictures], dtype=np.int64)
    labels = (
        np.concatenate([picture.labels for picture in pictures])
        if pictures
        else np.empty(0, np.int16)
    )
    sizes = (
        np.concatenate([picture.box_sizes_px for picture in pictures]) if pictures else np.empty(0)
    )
    dropped: Counter[str] = Counter()
    for picture in pictures:
        dropped.update(picture.dropped)
    targets = np.array(
        [picture.target for picture in pictures if picture.target is not None], np.int64
    )
    per_class = np.bincount(
        np.concatenate([labels.astype(np.int64), targets]), minlength=len(class_names)
    )
    percentiles = np.percentile(sizes, PERCENTILES).round(2).tolist() if sizes.size else []
    return {
        "pictures": len(pictures),
        "boxes": int(counts.sum()),
        "boxes_per_picture": {
            "min": int(counts.min()),
            "mean": round(float(counts.mean()), 3),
            "max": int(counts.max()),
        }
        if counts.size
        else {},
        "per_class": {name: int(count) for name, count in zip(class_names, per_class, strict=True)},
        "box_size_px": {f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=False)},
        "empty": int((counts == 0).sum()),
        "clipped": sum(picture.clipped for picture in pictures),
        "dropped": dict(sorted(dropped.items())),
        "duplicates": sum(picture.duplicates for picture in pictures),
    }


def summarise_by(
    pictures: Sequence[PictureFacts], class_names: Sequence[str], key: str
) -> dict[str, dict[str, Any]]:
    """A summary for each value of `split` or `folder`."""
    groups: dict[str, list[PictureFacts]] = {}
    for picture in pictures:
        groups.setdefault(getattr(picture, key), []).append(picture)
    order = sorted(
        groups, key=lambda name: (SPLIT_NAMES.index(name) if key == "split" else 0, name)
    )
    return {name: summarise(groups[name], class_names) for name in order}


def summary_rows(summary: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The manifest's summary as flat rows: scope (all, split, folder), name, counts.

    Per class one row more each.
    """
    scopes = [("all", "all", summary["all"])]
    scopes += [("split", name, part) for name, part in summary["splits"].items()]
    scopes += [("folder", name, part) for name, part in summary["folders"].items()]
    for scope, name, part in scopes:
        per_picture = part["boxes_per_picture"]
        common = {"scope": scope, "name": name, "pictures": part["pictures"]}
        yield common | {
            "class": None,
            "boxes": part["boxes"],
            "boxes_min": per_picture.get("min"),
            "boxes_mean": per_picture.get("mean"),
            "boxes_max": per_picture.get("max"),
            "size_p50_px": part["box_size_px"].get("p50"),
            "empty": part["empty"],
            "clipped": part["clipped"],
            "dropped": sum(part["dropped"].values()),
            "duplicates": part["duplicates"],
        }
        for class_name, boxes in part["per_class"].items():
            yield common | {"class": class_name, "boxes": boxes}


SUMMARY_SCHEMA = pa.schema(
    [
        ("scope", pa.string()),
        ("name", pa.string()),
        ("class", pa.string()),
        ("pictures", pa.int64()),
        ("boxes", pa.int64()),
        ("boxes_min", pa.int64()),
        ("boxes_mean", pa.float64()),
        ("boxes_max", pa.int64()),
        ("size_p50_px", pa.float64()),
        ("empty", pa.int64()),
        ("clipped", pa.int64()),
        ("dropped", pa.int64()),
        ("duplicates", pa.int64()),
    ]
)


def summary_table(summary: Mapping[str, Any]) -> pa.Table:
    """The manifest's summary with a row for each scope and class."""
    return pa.Table.from_pylist(list(summary_rows(summary)), schema=SUMMARY_SCHEMA)


def picture_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary as the few lines that a log shows: one for each split, one for all."""
    lines = []
    for name, part in (*summary["splits"].items(), ("all", summary["all"])):
        per = part["boxes_per_picture"]
        dropped = ", ".join(f"{count} {reason}" for reason, count in part["dropped"].items())
        boxes = (
            f"{part['boxes']} boxes ({per['min']}-{per['max']}, mean {per['mean']:.1f} a picture)"
        )
        lines.append(
            f"{name}: {part['pictures']} pictures, {boxes}; {part['empty']} empty, "
            f"{part['clipped']} clipped, dropped {dropped or 'none'}"
        )

    return lines


def picture_tables(manifest: Manifest) -> list[TextTable]:
    """The summary for a terminal: counts by scope and, if there are classes, boxes by class."""
    summary = manifest.summary
    scopes = [("all", summary["all"]), *summary["splits"].items()]
    scopes += [(f"{folder}/", part) for folder, part in summary["folders"].items()]
    columns = (
        "scope",
        "pictures",
        "boxes",
        "a picture",
        "size p50 px",
        "empty",
        "clipped",
        "dropped",
        "duplicates",
    )
    found = [TextTable("summary", columns, tuple(_scope_row(*scope) for scope in scopes))]

    if manifest.class_names:
        parts = [summary["splits"][split]["per_class"] for split in manifest.splits]
        rows = tuple((name, *(str(part[name]) for part in parts)) for name in manifest.class_names)
        found.append(TextTable("boxes of each class", ("class", *manifest.splits), rows))

    return found


def _scope_row(name: str, part: Mapping[str, Any]) -> tuple[str, ...]:
    per = part["boxes_per_picture"]
    values = (
        part["pictures"],
        part["boxes"],
        f"{per['min']}-{per['max']}, {per['mean']}",
        part["box_size_px"].get("p50", "-"),
        part["empty"],
        part["clipped"],
        sum(part["dropped"].values()),
        part["duplicates"],
    )
    return (name, *map(str, values))
