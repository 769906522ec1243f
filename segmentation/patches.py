"""Cut large images into a published version of overlapping patches, and write the manifest that
says where each patch came from.

    <split>/image   u1 [sample, channel, y, x]   a stored chunk is a job of `job_size` patches
            mask    u1 [sample, y, x]            class of each pixel, 255 where there is no mask

Patches lie on a regular grid of stride `patch_size - overlap`; the last of a row or column is
shifted inward, so that all have one size and none is padded. Splits are of parents, never of
patches; images without a mask form the split `predict`. The builder writes the version: its markers
make it resumable, and an image that turns out to be damaged sends the plan back, which the queue of
the features cannot do. Memory holds the boxes of all parents, the parent being cut, and 16 patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from segmentation.settings import SegmentSettings
from warehouse.errors import ConfigError, TrainingError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.picture_summary import PictureFacts, summarise
from warehouse.layouts.pictures import SAMPLES_SCHEMA, Pictures
from warehouse.layouts.plan import BuildPlan, SplitPlan
from warehouse.settings import MASK_PADDING, SPLIT_NAMES

__all__ = [
    "PREDICT",
    "ParentLike",
    "patch_boxes",
    "patch_offsets",
    "patch_recipe",
    "plan_patches",
]

PREDICT = "predict"
PATCH_SCHEMA = pa.schema(
    [*SAMPLES_SCHEMA, *((name, pa.int32()) for name in ("row", "column", "x1", "y1", "x2", "y2"))]
)
Box = tuple[int, int, int, int]


class ParentLike(Protocol):
    """A large image, as `ingest.pictures.large.survey.Parent` is one.

    `split` is train, val, test or `predict`; `mask` is None for an image without one.
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
    """Return where patches begin along a side of `length` pixels.

    They begin every `size - overlap` pixels; the last one is shifted inward to end with the side.

    Raises
    ------
    ConfigError
        A patch is longer than the side, or the overlap leaves no stride.
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
            "a patch is larger than the image",
            where="segment.patch_size",
            expected=f"at most {length} pixels",
            found=size,
            remedy="lower --segment.patch_size",
        )
    offsets = list(range(0, length - size + 1, size - overlap))
    # Shifted rather than padded: padding would be data that no image has, at every border.
    if offsets[-1] + size < length:
        offsets.append(length - size)
    return offsets


def patch_boxes(width: int, height: int, size: int, overlap: int) -> list[tuple[int, int, Box]]:
    """Return (row, column, box_xyxy) of every patch of an image, row by row."""
    columns = patch_offsets(width, size, overlap)
    return [
        (row, column, (x, y, x + size, y + size))
        for row, y in enumerate(patch_offsets(height, size, overlap))
        for column, x in enumerate(columns)
    ]


def patch_recipe(
    sources: str, settings: SegmentSettings, decoders: Mapping[str, str]
) -> dict[str, Any]:
    """Return the recipe that names a version of patches.

    Parameters
    ----------
    sources
        The fingerprint of the listed files.
    settings
        Those that decide the patches become part of the recipe.
    decoders
        Versions of the libraries that decode and cut.
    """
    # Sorted, so that the order in which a user lists the values does not change the version's name.
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
    """Plan the build of all parents' patches; a sample's payload is (parent, box_xyxy).

    Parameters
    ----------
    parents
        The images to cut, in the order of their patches.
    recipe
        As of `patch_recipe`.
    channels
        1 or 3.
    found, rejected, warnings
        What the survey of the files found, for the manifest; `rejected` holds dataclasses.

    Raises
    ------
    TrainingError
        There is no parent.
    """
    if not parents:
        raise TrainingError(
            "no image is left to cut",
            remedy="run scripts.segment_patches with --segment.max_invalid 0 to see the reasons",
        )

    version, key = version_name(recipe)
    classes = tuple(str(index) for index in range(max(recipe["mask_values"].values()) + 1))
    splits = []
    for name in (*SPLIT_NAMES, PREDICT):
        members = [parent for parent in parents if parent.split == name]
        if members:
            splits.append(_plan_split(name, members, channels, recipe["settings"]))

    summary = _summary(splits, classes)
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
        group_summaries=summary["splits"],
        warnings=tuple(warnings),
        layout=Pictures(PATCH_SCHEMA),
    )


def _plan_split(
    name: str, parents: Sequence[ParentLike], channels: int, settings: Mapping[str, Any]
) -> SplitPlan:
    """Plan one split: every patch of its parents."""
    size = settings["patch_size"]
    # By parent, row and column, so that a parent is decoded once and `patches_of` finds a parent's
    # patches side by side.
    samples = [
        (parent, row, column, box)
        for parent in parents
        for row, column, box in patch_boxes(parent.width, parent.height, size, settings["overlap"])
    ]
    # Also of the mask: a corrected mask makes other samples of an image that has not changed.
    digest = {
        id(parent): f"{parent.sha256}\0{parent.mask}\0{parent.mask_sha256}" for parent in parents
    }
    return SplitPlan(
        name=name,
        specs=patch_arrays(len(samples), settings["job_size"], channels, size),
        payloads=tuple((parent, box) for parent, _, _, box in samples),
        digests=tuple(digest[id(parent)] for parent, _, _, _ in samples),
        rows=tuple(_row(*sample) for sample in samples),
    )


def _summary(splits: Sequence[SplitPlan], classes: tuple[str, ...]) -> dict[str, Any]:
    """Summarise the patches as a whole, by split and by folder."""
    # Patches have no boxes whose classes and areas could be counted.
    facts = {
        split.name: [
            PictureFacts(split.name, row["folder"], np.empty(0, np.int16), np.empty(0))
            for row in split.rows
        ]
        for split in splits
    }
    every = [fact for part in facts.values() for fact in part]
    return {
        "all": summarise(every, classes),
        "splits": {name: summarise(part, classes) for name, part in facts.items()},
        "folders": {
            folder: summarise([fact for fact in every if fact.folder == folder], classes)
            for folder in sorted({fact.folder for fact in every})
        },
    }


def patch_arrays(samples: int, chunk: int, channels: int, size: int) -> tuple[ArraySpec, ...]:
    """Return the arrays `image` and `mask` of a split with so many samples."""

    def spec(
        name: str, dims: tuple[str, ...], row: tuple[int, ...], attributes: dict[str, Any]
    ) -> ArraySpec:
        codec = Codec("lz4", 9, False, 1, math.prod(row))
        return ArraySpec(
            name, (samples, *row), "uint8", dims, (chunk, *row), (1, *row), codec, attributes
        )

    image = {"long_name": "patch, RGB or grey, in [0, 1]", "scale_factor": 1 / 255}
    mask = {"long_name": f"class of each pixel; {MASK_PADDING} where there is no mask"}
    return (
        spec("image", ("sample", "channel", "y", "x"), (channels, size, size), image),
        spec("mask", ("sample", "y", "x"), (size, size), mask),
    )


def _row(parent: ParentLike, row: int, column: int, box: Box) -> dict[str, Any]:
    return {
        "source": parent.source,
        "source_sha256": parent.sha256,
        "raw_width": parent.width,
        "raw_height": parent.height,
        "orientation": 1,
        "group": parent.group,
        "folder": str(Path(parent.source).parent),
        # The schema is that of images with boxes; patches have none.
        **dict.fromkeys(("boxes", "clipped", "dropped", "duplicates"), 0),
        "row": row,
        "column": column,
        **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
    }
