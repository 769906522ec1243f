"""From scanned pictures to what the builder bakes: splits in stored order, arrays, rows, summaries.

The recipe is known before a picture is opened, so that "already built" answers at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ingest.pictures.images import decoder_versions, load_sample, plan_letterbox
from ingest.pictures.validate import Scan
from ingest.records.base import PictureRecord
from ingest.records.formats import get_format
from ingest.sources.listing import SourceListing
from ingest.sources.splits import permuted
from warehouse.errors import ThresholdError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, picture_arrays
from warehouse.layouts.picture_summary import PictureFacts, summarise, summarise_by
from warehouse.layouts.pictures import Pictures
from warehouse.layouts.plan import BuildPlan, LoadSample, SplitPlan
from warehouse.settings import SPLIT_NAMES, BuildSettings

__all__ = ["make_loader", "make_plan", "recipe_of"]

THRESHOLDS = ("max_invalid", "max_missing", "max_empty_ratio")


def recipe_of(listing: SourceListing, settings: BuildSettings) -> dict[str, Any]:
    """Return everything that decides a version's content; its hash is the version's name."""
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "sources": listing.fingerprint,
        "format": listing.format,
        "settings": settings.content(),
        "decoder": decoder_versions(),
    }
    # Only where masks exist: versions of other formats keep the names that they had before masks.
    if get_format(listing.format).has_masks:
        recipe["mask_values"] = {
            str(value): index for value, index in sorted(settings.mask_values.items())
        }
    return recipe


def make_plan(listing: SourceListing, scan: Scan, settings: BuildSettings) -> BuildPlan:
    """Plan the build of a scanned listing.

    Raises
    ------
    ThresholdError
        If nothing is left to bake.
    """
    if not scan.records:
        raise ThresholdError(
            "no picture is left to bake",
            where=listing.root,
            found=f"{scan.found} found, all refused",
            remedy="python -m scripts.build_zarr --build.dry_run true lists why",
        )
    recipe = recipe_of(listing, settings)
    version, key = version_name(recipe)
    splits: list[SplitPlan] = []
    facts: list[PictureFacts] = []
    for name in SPLIT_NAMES:
        records = [record for record in scan.records if record.split == name]
        if records:
            # Permuted once here, so that a stored chunk is a random sample of its split and batches
            # from one chunk are good training batches.
            split, known = _plan_split(name, permuted(records, settings.seed), scan, settings)
            splits.append(split)
            facts += known

    by_split = summarise_by(facts, scan.class_names, "split")
    summary = {
        "all": summarise(facts, scan.class_names),
        "splits": by_split,
        "folders": summarise_by(facts, scan.class_names, "folder"),
    }
    thresholds = {name: getattr(settings, name) for name in THRESHOLDS}
    return BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        thresholds=thresholds,
        toolchain=toolchain() | decoder_versions(),
        splits=tuple(splits),
        class_names=tuple(scan.class_names),
        found=scan.found,
        kept=len(scan.records),
        rejected=tuple(asdict(line) for line in scan.rejected),
        summary=summary,
        group_summaries=by_split,
        warnings=tuple(scan.warnings),
        layout=Pictures(),
    )


def _plan_split(
    name: str, records: Sequence[PictureRecord], scan: Scan, settings: BuildSettings
) -> tuple[SplitPlan, list[PictureFacts]]:
    source_format = get_format(scan.format)
    arrays = picture_arrays(
        len(records),
        settings,
        target=source_format.has_picture_classes,
        mask=source_format.has_masks,
    )
    facts = [_facts(record, settings) for record in records]
    split = SplitPlan(
        name=name,
        specs=tuple(arrays),
        payloads=tuple(records),
        digests=tuple(_digest(record, scan.class_names) for record in records),
        rows=tuple(_row(record, fact) for record, fact in zip(records, facts, strict=True)),
    )
    return split, facts


def make_loader(listing: SourceListing, settings: BuildSettings, plan: BuildPlan) -> LoadSample:
    """Return the function that makes the sample of a record; it travels to worker processes."""
    return partial(
        load_sample, root=listing.root, settings=settings, class_count=len(plan.class_names)
    )


def _digest(record: PictureRecord, class_names: Sequence[str]) -> str:
    """Hash the boxes of a picture and what their labels mean.

    The names are part of it because class ids shift when a class loses its last picture.
    """
    digest = hashlib.sha256(json.dumps(list(class_names)).encode())
    for array in (record.boxes_xyxy, record.labels, record.flags):
        digest.update(np.ascontiguousarray(array).tobytes())
    if record.target is not None or record.mask is not None:
        # Only where they exist: the digests of other pictures stay what they were without them.
        digest.update(f"{record.target}\0{record.mask}\0{record.mask_sha256}".encode())
    return digest.hexdigest()


def _row(record: PictureRecord, facts: PictureFacts) -> dict[str, Any]:
    return {
        "source": record.source,
        "source_sha256": record.sha256,
        "raw_width": record.raw_width,
        "raw_height": record.raw_height,
        "orientation": record.orientation,
        "group": record.group,
        "folder": facts.folder,
        "boxes": len(record.labels),
        "clipped": facts.clipped,
        "dropped": sum(facts.dropped.values()),
        "duplicates": facts.duplicates,
    }


def _facts(record: PictureRecord, settings: BuildSettings) -> PictureFacts:
    geometry = plan_letterbox(
        record.raw_width, record.raw_height, settings.target_size, settings.resize_mode
    )
    # Sizes on the canvas, which is what training sees.
    scale = np.array([geometry.scale_x, geometry.scale_y])
    sides = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2]) * scale
    dropped = dict(record.counts)
    # A clipped box is kept, and a duplicate loses nothing: neither counts as dropped.
    clipped, duplicates = dropped.pop("clipped", 0), dropped.pop("duplicate", 0)
    return PictureFacts(
        split=record.split,
        folder=str(PurePosixPath(record.source).parent),
        labels=record.labels,
        box_sizes_px=np.sqrt(sides.prod(axis=1)),
        clipped=clipped,
        duplicates=duplicates,
        dropped=dropped,
        target=record.target,
    )
