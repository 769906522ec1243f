"""Counts people look at before they train: per split, per source folder and in all.

And their export as Parquet tables.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from warehouse.errors import BuildError, CorruptError
from warehouse.format import manifest as tables
from warehouse.inspect.cube_report import feature_table
from warehouse.read.version import Warehouse
from warehouse.settings import SPLIT_NAMES

__all__ = [
    "SAMPLES_SCHEMA",
    "PictureFacts",
    "export",
    "summarise",
    "summarise_by",
]

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("raw_width", pa.int32()),
        ("raw_height", pa.int32()),
        ("orientation", pa.int8()),
        ("group", pa.string()),
        ("folder", pa.string()),
        ("boxes", pa.int32()),
        ("clipped", pa.int32()),
        ("dropped", pa.int32()),
        ("duplicates", pa.int32()),
        ("sha256", pa.string()),
    ]
)
"""sha256: of the sample's decoded arrays; source_sha256: of the picture file."""


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What a summary needs to know of one kept picture. box_sizes_px: sqrt of each box's area on
    the canvas, in pixels; target: its class, of sources that give one a picture."""

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


def summary_rows(summary: dict[str, Any]) -> Iterable[dict[str, Any]]:
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


def summary_table(warehouse: Warehouse) -> pa.Table:
    """Pictures: a row a scope and class. Cubes: a row a feature.

    What was made of a version (codes, features): a row a key, as JSON.
    """
    if warehouse.cube is not None:
        return feature_table(warehouse.cube)
    if "all" not in warehouse.manifest.summary:
        facts = warehouse.manifest.summary
        return pa.table(
            {"key": list(facts), "value": [json.dumps(value) for value in facts.values()]}
        )
    return pa.Table.from_pylist(
        list(summary_rows(warehouse.manifest.summary)), schema=SUMMARY_SCHEMA
    )


def export(warehouse: Warehouse, output: Path) -> dict[str, int]:
    """Write summary, samples, chunks and trace as Parquet into `output`; rows by file name.

    Raises BuildError when it cannot.
    """
    files = warehouse.table(tables.FILES)
    trace = warehouse.folder / tables.TRACE
    written = {
        "summary.parquet": summary_table(warehouse),
        "samples.parquet": warehouse.table(tables.SAMPLES),
        "chunks.parquet": files.filter(pa.compute.is_valid(files["array"])),
    }
    if trace.is_file():
        try:
            lines = [json.loads(line) for line in trace.read_text().splitlines()]
        except ValueError as error:
            raise CorruptError(
                "the timings do not parse",
                where=trace,
                found=str(error)[:80],
                remedy="delete the file to export the rest",
            ) from None
        written["trace.parquet"] = pa.Table.from_pylist(lines)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, table in written.items():
            pq.write_table(table, output / name)
    except OSError as error:
        raise BuildError(
            "the tables cannot be written",
            where=output,
            found=error.strerror,
            remedy="choose another --export.output",
        ) from None
    return {name: table.num_rows for name, table in written.items()}
