"""From a listing to what will be baked: every picture is kept, or refused with its reason.

found = kept + rejected pictures; this is checked at the end. What fails only while it is baked
comes back as `unreadable` and the scan is made again without it, so that a plan is always a
function of the sources and of that list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from ingest.pictures.judge import (
    MISSING,
    SKIPPED,
    JudgedPicture,
    KeptPicture,
    bound_boxes,
    judge_picture,
)
from ingest.records.base import Parsed, PictureRecord, RawPicture, Rejection
from ingest.records.formats import get_format
from ingest.sources.listing import SourceListing
from ingest.sources.splits import assign_splits
from warehouse.errors import PictureError
from warehouse.settings import BuildSettings

__all__ = ["Scan", "scan"]

EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
}


@dataclass(frozen=True)
class Scan:
    """What a build will write, and what it refuses.

    Attributes
    ----------
    format
        Name of the annotation format.
    records
        The kept pictures, sorted by path.
    rejected
        Everything that was refused, sorted by path.
    class_names
        Names of the classes, in the order of the labels.
    found
        Number of listed pictures.
    warnings
        Remarks for the user, one line each.
    counts
        `kept`, `invalid`, `missing_annotations`, `missing_pictures`, `background` (missing taken as
        empty), `skipped` (empty, left out by `skip_empty`), `empty` (kept without boxes), `boxes`,
        `clipped`, and one entry for each reason for which a box was dropped.
    """

    format: str
    records: list[PictureRecord]
    rejected: list[Rejection]
    class_names: tuple[str, ...]
    found: int
    warnings: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Number of pictures that will be baked."""
        return len(self.records)

    @property
    def rejected_pictures(self) -> int:
        """Number of pictures that are refused."""
        return sum(item.kind == "picture" for item in self.rejected)


def scan(
    listing: SourceListing,
    settings: BuildSettings,
    *,
    unreadable: Mapping[str, PictureError] | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int = 2,
) -> Scan:
    """Parse annotations, read headers, judge pictures and boxes, and assign splits.

    Parameters
    ----------
    unreadable
        Pictures that failed while they were baked, with their errors, by path.
    progress
        Called with numbers of pictures that are done.
    workers
        Number of threads that read headers.

    Raises
    ------
    AnnotationError
        For an annotation file or a list of names that cannot be used, and for more than `max_boxes`
        boxes in a picture.
    SourceError
        If a file changed since it was listed.
    """
    parsed = get_format(listing.format).parse(listing)
    names = _class_names(parsed, settings)
    class_ids = {name: at for at, name in enumerate(names)}
    failed = dict(unreadable or {})

    def judge(raw: RawPicture) -> JudgedPicture:
        judged = judge_picture(raw, listing, settings, class_ids, failed.get(raw.source))
        if progress is not None:
            progress(1)
        return judged

    # Threads, since nearly all of the time is spent waiting for the disk. `map` keeps the order of
    # the annotations, so the result does not depend on the number of threads.
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        judged = list(pool.map(judge, parsed.pictures))
    kept = bound_boxes([item.kept for item in judged if item.kept is not None], settings)
    names, kept = _drop_unused_classes(names, kept, parsed, settings)

    rejected = [*parsed.rejected, *_rejections(judged, kept)]
    records, warnings = _records(kept, listing, settings, names)
    warnings += _oddities(kept, rejected)
    result = Scan(
        listing.format,
        records,
        sorted(rejected, key=lambda item: (item.path, item.kind, item.reason, item.detail)),
        names,
        len(listing.pictures),
        [*listing.warnings, *parsed.warnings, *warnings],
    )
    # The sums are an invariant of the version's tables, so a mistake here must not be published.
    assert result.found == result.kept + result.rejected_pictures, "a picture was lost"
    return replace(result, counts=_count(result, kept, settings))


def _rejections(judged: list[JudgedPicture], kept: list[KeptPicture]) -> list[Rejection]:
    rejected = [item.refused for item in judged if item.refused is not None]
    dropped = {item.raw.source: item.dropped for item in kept}
    for item in judged:
        # `max_boxes` may have dropped more boxes of a kept picture since it was judged.
        rejected += item.dropped if item.kept is None else dropped[item.kept.raw.source]
    return rejected


def _class_names(parsed: Parsed, settings: BuildSettings) -> tuple[str, ...]:
    if settings.classes is not None:
        return tuple(settings.classes)
    if parsed.class_names is not None:
        return parsed.class_names
    return tuple(dict.fromkeys(box.class_name for raw in parsed.pictures for box in raw.boxes))


def _drop_unused_classes(
    names: tuple[str, ...],
    kept: list[KeptPicture],
    parsed: Parsed,
    settings: BuildSettings,
) -> tuple[tuple[str, ...], list[KeptPicture]]:
    """Leave out classes that no kept box uses, and number the others anew.

    Only placeholders may go, or any class where the data set has no list of its own.
    """
    if settings.classes is not None:
        return names, kept
    used = {int(label) for item in kept for label in np.unique(item.clean.labels)}
    # Class ids of a list that the data set declares keep their meaning even where a class has no
    # box, since other tools count on them.
    may_go = set(names) if parsed.class_names is None else parsed.placeholders
    stays = [at for at, name in enumerate(names) if at in used or name not in may_go]
    if len(stays) == len(names):
        return names, kept

    new = np.full(len(names), -1, np.int16)
    new[stays] = np.arange(len(stays), dtype=np.int16)
    renumbered = [
        replace(item, clean=replace(item.clean, labels=new[item.clean.labels])) for item in kept
    ]
    return tuple(names[at] for at in stays), renumbered


def _records(
    kept: list[KeptPicture],
    listing: SourceListing,
    settings: BuildSettings,
    names: Sequence[str],
) -> tuple[list[PictureRecord], list[str]]:
    # Formats list pictures in the order of their annotation files, which is not that of the paths.
    kept = sorted(kept, key=lambda item: item.raw.source)
    digests = [listing.sha256_of(item.raw.source) for item in kept]
    targets = [
        None if item.raw.class_name is None else names.index(item.raw.class_name) for item in kept
    ]
    assigned = assign_splits([item.raw.source for item in kept], digests, settings, targets)
    records = []
    for item, target, digest, split, group in zip(
        kept, targets, digests, assigned.splits, assigned.groups, strict=True
    ):
        header, clean, mask = item.header, item.clean, item.raw.mask
        counts = dict(Counter(reason for _, reason in clean.dropped))
        if clean.clipped:
            counts["clipped"] = clean.clipped
        records.append(
            PictureRecord(
                source=item.raw.source,
                split=split,
                group=group,
                sha256=digest,
                raw_width=header.width,
                raw_height=header.height,
                orientation=header.orientation,
                boxes_xyxy=clean.boxes_xyxy,
                labels=clean.labels,
                flags=clean.flags,
                counts=counts,
                target=target,
                mask=mask,
                mask_sha256=None if mask is None else listing.sha256_of(mask),
            )
        )
    return records, list(assigned.warnings)


def _oddities(kept: Sequence[KeptPicture], rejected: Sequence[Rejection]) -> list[str]:
    """Warn of what was accepted but deserves a look: a line each, with a count and one example."""
    found = {
        "annotations declare another size than their picture has; boxes taken as they are": [
            item for item in kept if item.declares_other_size
        ],
        "pictures are not of the kind that their extension says; decoded by content": [
            item for item in kept if _is_mislabelled(item)
        ],
    }
    lines = [
        f"{len(items)} {what}, such as {items[0].raw.source}"
        for what, items in found.items()
        if items
    ]
    boxes = [item for item in rejected if item.kind == "box"]
    if boxes:
        reasons = sorted(Counter(item.reason for item in boxes).items())
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons)
        example = f"such as {boxes[0].path}, {boxes[0].detail}"
        lines.append(f"{len(boxes)} boxes left out ({counts}), {example}")
    return lines


def _is_mislabelled(item: KeptPicture) -> bool:
    # A warning only: cameras and web sites do save JPEG files with the extension of PNG.
    return item.raw.source.rpartition(".")[2].lower() not in EXTENSIONS[item.header.kind]


def _count(result: Scan, kept: Sequence[KeptPicture], settings: BuildSettings) -> dict[str, int]:
    pictures = Counter(item.reason for item in result.rejected if item.kind == "picture")
    missing = pictures.pop(MISSING, 0)
    skipped = pictures.pop(SKIPPED, 0)
    background = 0
    # Such pictures are kept, so their number appears nowhere else.
    if settings.missing_is_empty and get_format(result.format).has_boxes:
        background = sum(item.raw.annotation is None for item in kept)
    boxes = Counter(item.reason for item in result.rejected if item.kind == "box")
    return {
        "kept": result.kept,
        "invalid": sum(pictures.values()),
        "missing_annotations": missing,
        "missing_pictures": sum(item.reason == "missing_picture" for item in result.rejected),
        "background": background,
        "skipped": skipped,
        "empty": sum(not len(record.labels) for record in result.records),
        "boxes": sum(len(record.labels) for record in result.records),
        "clipped": sum(record.counts.get("clipped", 0) for record in result.records),
        **dict(sorted(boxes.items())),
    }
