"""Large pictures as a published version of overlapping patches, and the manifest that says where
each patch came from.

    <split>/image   u1 [sample, channel, y, x]   a stored chunk is a job of `job_size` patches
            mask    u1 [sample, y, x]            class of each pixel, 255 where there is no mask

Patches lie on a regular grid of stride `patch_size - overlap`; the last of a row or column is
shifted inward, so that all have one size and none is padded. Patches follow one another by parent,
row, column: a parent is decoded once. Splits are of parents, never of patches; pictures without a
mask are the split `predict`. Baking is the builder's: its markers make it resumable, and a picture
that turns out damaged sends the plan back, which the features' queue has no way to do. Memory: the
parents' boxes, a parent being cut, 16 patches.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segmentation.settings import SegmentSettings
from warehouse.errors import ConfigError, TrainingError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.picture_summary import PictureFacts, summarise
from warehouse.layouts.pictures import SAMPLES_SCHEMA, Pictures
from warehouse.layouts.plan import BuildPlan, SplitPlan
from warehouse.read.version import Warehouse
from warehouse.settings import MASK_PADDING, SPLIT_NAMES

__all__ = [
    "PREDICT",
    "ParentLike",
    "patch_boxes",
    "patch_offsets",
    "patch_recipe",
    "plan_patches",
    "write_patch_manifest",
]

PREDICT = "predict"
PATCH_SCHEMA = pa.schema(
    [*SAMPLES_SCHEMA, *((name, pa.int32()) for name in ("row", "column", "x1", "y1", "x2", "y2"))]
)
Box = tuple[int, int, int, int]


class ParentLike(Protocol):
    """A large picture, as `ingest.pictures.large.survey.Parent`. split.

    Train, val, test or `predict`.
    """

    @property
    def source(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def mask(self) -> str | None: ...
    @property
    def mask_sha256(self) -> str | None: ...


def patch_offsets(length: int, size: int, overlap: int) -> list[int]:
    """Where patches begin along a side of `length` pixels: every `size - overlap`, the last one
    shifted inward to end with the side.

    Raises ConfigError for a patch longer than the side, and for an overlap that leaves no stride.
    """
    if not 0 <= overlap < size:
        raise ConfigError(
            "patches must advance",
            where="segment.overlap",
            expected=f"0 to {size - 1} pixels",
            found=overlap,
            remedy="lower --segment.overlap",
        )
    if size > length:
        raise ConfigError(
            "a patch is larger than the picture",
            where="segment.patch_size",
            expected=f"at most {length} pixels",
            found=size,
            remedy="lower --segment.patch_size",
        )
    offsets = list(range(0, length - size + 1, size - overlap))
    if offsets[-1] + size < length:
        offsets.append(length - size)
    return offsets


def patch_boxes(width: int, height: int, size: int, overlap: int) -> list[tuple[int, int, Box]]:
    """(row, column, box_xyxy) of every patch of a picture, row by row."""
    columns = patch_offsets(width, size, overlap)
    return [
        (row, column, (x, y, x + size, y + size))
        for row, y in enumerate(patch_offsets(height, size, overlap))
        for column, x in enumerate(columns)
    ]


def patch_recipe(
    sources: str, settings: SegmentSettings, decoders: Mapping[str, str]
) -> dict[str, Any]:
    """The recipe that names a version of patches.

    Parameters
    ----------
    sources
        The fingerprint of the listed files.
    settings
        Those that decide the patches become part of the recipe.
    decoders
        Versions of the libraries that decode and cut.
    """
    values = sorted(settings.mask_values.items())
    return {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "patches",
        "sources": sources,
        "settings": settings.content(),
        "mask_values": {str(value): index for value, index in values},
        "decoder": dict(decoders),
    }


def plan_patches(
    parents: Sequence[ParentLike],
    recipe: dict[str, Any],
    *,
    channels: int,
    found: int,
    rejected: Iterable[Any],
    warnings: Sequence[str],
) -> BuildPlan:
    """The build of all parents' patches; a sample's payload is (parent, box_xyxy).

    Raises TrainingError without any parent.
    """
    if not parents:
        raise TrainingError(
            "no picture is left to cut",
            remedy="python -m scripts.segment_patches --segment.max_invalid 0 says why",
        )
    settings = recipe["settings"]
    size, chunk = settings["patch_size"], settings["job_size"]
    version, key = version_name(recipe)
    classes = tuple(str(index) for index in range(max(recipe["mask_values"].values()) + 1))
    splits, summaries, every = [], {}, []
    for name in (*SPLIT_NAMES, PREDICT):
        samples = [
            (parent, row, column, box)
            for parent in parents
            if parent.split == name
            for row, column, box in patch_boxes(
                parent.width, parent.height, size, settings["overlap"]
            )
        ]
        if not samples:
            continue
        digest = {
            id(parent): f"{parent.sha256}\0{parent.mask}\0{parent.mask_sha256}"
            for parent in parents
        }
        splits.append(
            SplitPlan(
                name=name,
                specs=patch_arrays(len(samples), chunk, channels, size),
                payloads=tuple((parent, box) for parent, _, _, box in samples),
                digests=tuple(digest[id(parent)] for parent, _, _, _ in samples),
                rows=tuple(_row(*sample) for sample in samples),
            )
        )
        facts = [
            PictureFacts(name, str(Path(parent.source).parent), np.empty(0, np.int16), np.empty(0))
            for parent, _, _, _ in samples
        ]
        summaries[name] = summarise(facts, classes)
        every += facts
    folders = sorted({fact.folder for fact in every})
    by_folder = {
        folder: summarise([fact for fact in every if fact.folder == folder], classes)
        for folder in folders
    }
    summary = {"all": summarise(every, classes), "splits": summaries, "folders": by_folder}
    return BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain() | recipe["decoder"],
        splits=tuple(splits),
        class_names=classes,
        found=found,
        kept=len(parents),
        rejected=tuple(asdict(line) for line in rejected),
        summary=summary,
        group_summaries=summaries,
        warnings=tuple(warnings),
        layout=Pictures(PATCH_SCHEMA),
    )


def patch_arrays(samples: int, chunk: int, channels: int, size: int) -> tuple[ArraySpec, ...]:
    row, plain = (channels, size, size), (size, size)
    image = {"long_name": "patch, RGB or grey, in [0, 1]", "scale_factor": 1 / 255}
    mask = {"long_name": f"class of each pixel; {MASK_PADDING} where there is no mask"}
    return (
        ArraySpec(
            "image",
            (samples, *row),
            "uint8",
            ("sample", "channel", "y", "x"),
            (chunk, *row),
            (1, *row),
            Codec("lz4", 9, False, 1, channels * size * size),
            image,
        ),
        ArraySpec(
            "mask",
            (samples, *plain),
            "uint8",
            ("sample", "y", "x"),
            (chunk, *plain),
            (1, *plain),
            Codec("lz4", 9, False, 1, size * size),
            mask,
        ),
    )


def write_patch_manifest(warehouse: Warehouse, folder: Path) -> Path:
    """patch_manifest.v<NNN>.parquet and .csv of a version of patches: a row a patch; the Parquet's
    path.

    A manifest that says the same is there already is left; another one gets the next number: none
    is ever overwritten. offset_x, offset_y: as used; shift_x, shift_y: pixels they were moved
    inward from the regular grid; features_path: the stored chunk that holds the patch, below the
    version's root, as its `slot`.
    """
    settings = warehouse.manifest.recipe["settings"]
    stride = settings["patch_size"] - settings["overlap"]
    rows = []
    for sample in warehouse.table(tables.SAMPLES).to_pylist():
        split, index = sample["split"], sample["index"]
        chunk, slot = divmod(index, settings["job_size"])
        rows.append(
            {
                "patch_id": f"{sample['source']}#{sample['row']}-{sample['column']}",
                "parent": sample["source"],
                "split": split,
                **{name: sample[name] for name in ("x1", "y1", "x2", "y2", "row", "column")},
                "offset_x": sample["x1"],
                "offset_y": sample["y1"],
                "shift_x": sample["column"] * stride - sample["x1"],
                "shift_y": sample["row"] * stride - sample["y1"],
                "parent_width": sample["raw_width"],
                "parent_height": sample["raw_height"],
                "index": index,
                "features_path": f"{warehouse.version}/{tables.STORE}/{split}/image/c/{chunk}/0/0/0",
                "slot": slot,
            }
        )
    sink, text = pa.BufferOutputStream(), io.StringIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    data = sink.getvalue().to_pybytes()
    known = sorted(folder.glob("patch_manifest.v[0-9][0-9][0-9].parquet"))
    for path in known:
        if path.read_bytes() == data:
            return path
    number = 1 + max((int(path.name.split(".v")[1][:3]) for path in known), default=0)
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # The Parquet file last: it is what says that a number is taken.
    target = folder / f"patch_manifest.v{number:03d}.parquet"
    durable.write_bytes(target.with_suffix(".csv"), text.getvalue().encode())
    durable.write_bytes(target, data)
    return target


def _row(parent: ParentLike, row: int, column: int, box: Box) -> dict[str, Any]:
    return {
        "source": parent.source,
        "source_sha256": parent.sha256,
        "raw_width": parent.width,
        "raw_height": parent.height,
        "orientation": 1,
        "group": parent.group,
        "folder": str(Path(parent.source).parent),
        "boxes": 0,
        "clipped": 0,
        "dropped": 0,
        "duplicates": 0,
        "row": row,
        "column": column,
        "x1": box[0],
        "y1": box[1],
        "x2": box[2],
        "y2": box[3],
    }
