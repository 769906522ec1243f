"""From a listing to what will be baked: every picture kept or refused with its reason, every box
judged.

found = kept + rejected pictures, checked at the end. Headers are read, pixels are not: only a
picture whose last bytes look cut off is decoded here, for decoding all twice would halve the speed
of a build. What then fails while being baked comes back as `unreadable` and the plan is made again
without it, so that a plan is always a function of the sources.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingest.pictures.boxes import BAD, CleanBoxes, clean_boxes, keep_largest, orient_boxes
from ingest.pictures.headers import Header
from ingest.pictures.images import probe
from ingest.pictures.letterbox import plan_letterbox
from ingest.records.base import Parsed, PictureRecord, RawPicture, Rejection
from ingest.records.classes import parse_classes
from ingest.records.coco import parse_coco
from ingest.records.folder import parse_folder
from ingest.records.masks import parse_masks
from ingest.records.voc import parse_voc
from ingest.records.yolo import parse_yolo
from ingest.sources import SourceListing
from ingest.splits import assign_splits
from warehouse.errors import AnnotationError, PictureError, ThresholdError
from warehouse.format.schema import BOXLESS
from warehouse.settings import BuildSettings

__all__ = ["Scan", "check_thresholds", "scan"]

log = logging.getLogger(__name__)
PARSERS: dict[str, Callable[[SourceListing], Parsed]] = {
    "voc": parse_voc,
    "coco": parse_coco,
    "yolo": parse_yolo,
    "folder": parse_folder,
    "classes": parse_classes,
    "masks": parse_masks,
}
EXTENSIONS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "PNG": ("png",),
    "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "GIF": ("gif",),
}
MISSING, SKIPPED = "missing_annotation", "empty"


@dataclass(frozen=True)
class Scan:
    """What a build will write, and what it refuses.

    records, rejected: sorted by path; found: pictures listed; counts: kept, invalid,
    missing_annotations, missing_pictures, background (missing taken as empty), skipped (empty,
    `skip_empty`), empty (kept without boxes), boxes, clipped, and one for each reason for which a
    box was dropped.
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
        return len(self.records)

    @property
    def rejected_pictures(self) -> int:
        return sum(item.kind == "picture" for item in self.rejected)

    @property
    def split_counts(self) -> dict[str, int]:
        return dict(Counter(record.split for record in self.records))


@dataclass(frozen=True, slots=True)
class _Judged:
    """One picture after its header was read and its boxes judged.

    `refused` is None where it is kept.
    """

    raw: RawPicture
    header: Header | None = None
    clean: CleanBoxes | None = None
    refused: Rejection | None = None
    boxes: tuple[Rejection, ...] = ()
    declared_otherwise: bool = False


def scan(
    listing: SourceListing,
    settings: BuildSettings,
    *,
    unreadable: Mapping[str, PictureError] | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int = 2,
) -> Scan:
    """Parse, read headers, judge, split. `unreadable`: pictures that failed while being baked, by
    source.

    Raises AnnotationError: a COCO file or a list of names that cannot be used, more than
    `max_boxes` boxes in a picture. SourceError: a file changed since it was listed.
    """
    parsed = PARSERS[listing.format](listing)
    names = tuple(settings.classes) if settings.classes is not None else parsed.class_names
    if names is None:
        names = tuple(dict.fromkeys(box.class_name for raw in parsed.pictures for box in raw.boxes))
    ids = {name: at for at, name in enumerate(names)}
    failed = dict(unreadable or {})

    def one(raw: RawPicture) -> _Judged:
        judged = _judge(raw, listing, settings, ids, failed.get(raw.source))
        if progress is not None:
            progress(1)
        return judged

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        judged = list(pool.map(one, parsed.pictures))
    kept = [item for item in judged if item.refused is None]
    kept = _bound_boxes(kept, settings)
    names, kept = _drop_unused(names, kept, parsed, settings)
    rejected = [*parsed.rejected, *(item.refused for item in judged if item.refused is not None)]
    final = {item.raw.source: item for item in kept}
    rejected += [box for item in judged for box in final.get(item.raw.source, item).boxes]
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
    assert result.found == result.kept + result.rejected_pictures, (
        "a picture was lost or counted twice"
    )
    return replace(result, counts=_count(result, kept, settings))


def check_thresholds(result: Scan, settings: BuildSettings) -> None:
    """Warn of what was refused, or raise ThresholdError with the counts, the first offenders and
    the flag that would allow it.
    """
    counts = result.counts
    invalid = [
        item
        for item in result.rejected
        if item.kind == "picture" and item.reason not in (MISSING, SKIPPED)
    ]
    over = _over(
        "invalid", counts["invalid"], settings.max_invalid, "pictures that cannot be used", invalid
    )
    if result.format not in BOXLESS:
        absent = [item for item in result.rejected if item.reason in (MISSING, "missing_picture")]
        what = f"{counts['missing_annotations']} without annotation, {counts['missing_pictures']} annotations without picture"
        hint = (
            ", or --build.missing_is_empty true to take such pictures as background"
            if counts["missing_annotations"]
            else ""
        )
        over += _over("missing", len(absent), settings.max_missing, what, absent, hint)
    if over:
        first, *others = over
        if others:
            # Both at once: whoever mends or allows one should not meet the other on the next try.
            remedy = "; ".join(
                [
                    first["remedy"],
                    *(f"and {one['text']}: {one['where']}, {one['remedy']}" for one in others),
                ]
            )
            first = {**first, "remedy": remedy}
        raise ThresholdError(first.pop("text"), **first)
    if not result.records:
        raise ThresholdError(
            "no picture is left",
            expected="at least one",
            found=f"{result.found} found, all rejected",
            remedy=f"the first: {_offenders(result.rejected)}",
        )
    empty = [record.source for record in result.records if not len(record.labels)]
    if result.format in BOXLESS or not empty:
        return
    ratio = len(empty) / result.kept
    text = f"{len(empty)} of {result.kept} kept pictures have no boxes ({', '.join(empty[:3])}{', ...' if len(empty) > 3 else ''})"
    if ratio > settings.max_empty_ratio:
        enough = (
            -(-len(empty) * 1000 // result.kept) / 1000
        )  # rounded up: the flag as printed is enough
        raise ThresholdError(
            text,
            expected=f"a share of at most {settings.max_empty_ratio:g}",
            found=f"{ratio:.3f}",
            remedy=f"allow it with --build.max_empty_ratio {enough:g}, or leave them out with --build.skip_empty true",
        )
    log.warning(text)


def _over(
    name: str, count: int, allowed: int, what: str, offenders: Sequence[Rejection], hint: str = ""
) -> list[dict[str, Any]]:
    """The parts of a ThresholdError where more than `allowed` were refused.

    A warning where some were, and nothing.
    """
    if count > allowed:
        return [
            {
                "text": f"too many {name} sources ({what})",
                "where": _offenders(offenders),
                "expected": f"at most {allowed}",
                "found": count,
                "remedy": f"mend or remove them, or allow them with --build.max_{name} {count}{hint}",
            }
        ]
    if count:
        log.warning(
            "%d %s sources left out, as --build.max_%s %d allows: %s",
            count,
            name,
            name,
            allowed,
            _offenders(offenders),
        )
    return []


def _offenders(items: Sequence[Rejection]) -> str:
    shown = [
        f"{item.path} ({item.reason}{': ' + item.detail[:120] if item.detail else ''})"
        for item in items[:3]
    ]
    return ", ".join(shown) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _judge(
    raw: RawPicture,
    listing: SourceListing,
    settings: BuildSettings,
    ids: dict[str, int],
    failed: PictureError | None,
) -> _Judged:
    try:
        if failed is not None:
            raise failed
        header = probe(listing.root, raw.source, max_pixels=settings.max_pixels)
    except PictureError as error:
        return _Judged(
            raw, refused=Rejection(raw.source, "picture", error.reason, str(error.found or ""))
        )
    if raw.class_name is not None and raw.class_name not in ids:
        return _Judged(
            raw, header, refused=Rejection(raw.source, "picture", "unknown_class", raw.class_name)
        )
    if raw.annotation is None and listing.format not in BOXLESS and not settings.missing_is_empty:
        return _Judged(
            raw,
            header,
            refused=Rejection(raw.source, "picture", MISSING, "no annotation of this picture"),
        )
    boxes = np.array([box.box_xyxy for box in raw.boxes], np.float64).reshape(-1, 4)
    size = (header.width, header.height)
    if raw.normalised:
        boxes = boxes * np.array([*size, *size], np.float64)
    stored = (header.raw_width, header.raw_height)
    if raw.declared_size == stored and stored != size:
        # The annotation tool did not apply EXIF. Where turning keeps the size (2, 3, 4) nothing
        # tells: the picture as shown is assumed.
        boxes = orient_boxes(boxes, *stored, header.orientation)
    geometry = plan_letterbox(*size, settings.target_size, settings.resize_mode)
    clean = clean_boxes(
        boxes,
        [ids.get(box.class_name, -1) for box in raw.boxes],
        [box.flags for box in raw.boxes],
        size,
        geometry,
    )
    drops = tuple(
        Rejection(raw.source, "box", reason, _describe(raw, at)) for at, reason in clean.dropped
    )
    refused = None
    if (
        raw.boxes
        and len(clean.dropped) == len(raw.boxes)
        and all(reason in BAD for _, reason in clean.dropped)
    ):
        refused = Rejection(
            raw.source, "picture", "no_valid_boxes", f"all of {len(raw.boxes)} boxes were bad"
        )
    elif settings.skip_empty and not len(clean.labels):
        refused = Rejection(raw.source, "picture", SKIPPED, "no boxes, left out by skip_empty")
    otherwise = raw.declared_size is not None and raw.declared_size not in (size, stored)
    return _Judged(raw, header, clean, refused, drops, otherwise)


def _oddities(kept: Sequence[_Judged], rejected: Sequence[Rejection]) -> list[str]:
    """What was accepted but deserves a look, a line each with a count and one example."""
    found = {
        "annotations declare another size than their picture has; boxes taken as given": [
            item for item in kept if item.declared_otherwise
        ],
        "pictures are not of the kind that their extension says; decoded by content": [
            item for item in kept if _mislabelled(item)
        ],
    }
    lines = [
        f"{len(items)} {what}, such as {items[0].raw.source}"
        for what, items in found.items()
        if items
    ]
    dropped = Counter(item.reason for item in rejected if item.kind == "box")
    if dropped:
        first = next(item for item in rejected if item.kind == "box")
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        lines.append(
            f"{sum(dropped.values())} boxes left out ({counts}), such as {first.path}, {first.detail}"
        )
    return lines


def _mislabelled(item: _Judged) -> bool:
    assert item.header is not None
    return item.raw.source.rpartition(".")[2].lower() not in EXTENSIONS[item.header.kind]


def _describe(raw: RawPicture, at: int) -> str:
    box = raw.boxes[at]
    return f"box {at} {box.class_name}: {', '.join(f'{value:g}' for value in box.box_xyxy)}"


def _bound_boxes(kept: list[_Judged], settings: BuildSettings) -> list[_Judged]:
    most = settings.max_boxes
    over = [item for item in kept if item.clean is not None and len(item.clean.labels) > most]
    if over and settings.too_many_boxes == "error":
        worst = max(over, key=lambda item: len(item.clean.labels) if item.clean else 0)
        needed = len(worst.clean.labels) if worst.clean else 0
        raise AnnotationError(
            f"more boxes than slots, in {len(over)} pictures",
            where=worst.raw.source,
            expected=f"at most {most}",
            found=needed,
            remedy=f"use --build.max_boxes {needed}, or --build.too_many_boxes truncate to keep the largest",
        )
    return [
        _truncate(item, most) if item.clean is not None and len(item.clean.labels) > most else item
        for item in kept
    ]


def _truncate(item: _Judged, most: int) -> _Judged:
    clean = item.clean
    assert clean is not None
    chosen = keep_largest(clean.boxes_xyxy, most)
    gone = {at for at, _ in clean.dropped}
    # Positions in the source of the boxes that cleaning kept.
    positions = [at for at in range(len(item.raw.boxes)) if at not in gone]
    dropped = tuple(
        (positions[at], "over_max_boxes")
        for at in sorted(set(range(len(positions))) - set(chosen.tolist()))
    )
    lines = tuple(
        Rejection(item.raw.source, "box", reason, _describe(item.raw, at)) for at, reason in dropped
    )
    smaller = CleanBoxes(
        clean.boxes_xyxy[chosen],
        clean.labels[chosen],
        clean.flags[chosen],
        (*clean.dropped, *dropped),
    )
    return replace(item, clean=smaller, boxes=(*item.boxes, *lines))


def _drop_unused(
    names: tuple[str, ...], kept: list[_Judged], parsed: Parsed, settings: BuildSettings
) -> tuple[tuple[str, ...], list[_Judged]]:
    """Leave out names that no kept box uses, where they are placeholders or the source has no list
    of its own; number anew.
    """
    if settings.classes is not None:
        return names, kept
    used = {
        int(label)
        for item in kept
        if item.clean is not None
        for label in np.unique(item.clean.labels)
    }
    may_go = set(names) if parsed.class_names is None else parsed.placeholders
    stays = [at for at, name in enumerate(names) if at in used or name not in may_go]
    if len(stays) == len(names):
        return names, kept
    new = np.full(len(names), -1, np.int16)
    new[stays] = np.arange(len(stays), dtype=np.int16)
    kept = [
        replace(item, clean=replace(item.clean, labels=new[item.clean.labels]))
        if item.clean is not None
        else item
        for item in kept
    ]
    return tuple(names[at] for at in stays), kept


def _records(
    kept: list[_Judged], listing: SourceListing, settings: BuildSettings, names: Sequence[str]
) -> tuple[list[PictureRecord], list[str]]:
    kept = sorted(kept, key=lambda item: item.raw.source)
    sources = [item.raw.source for item in kept]
    digests = [listing.sha256_of(source) for source in sources]
    targets = [
        None if item.raw.class_name is None else names.index(item.raw.class_name) for item in kept
    ]
    places = assign_splits(sources, digests, settings, targets)
    records = []
    for item, target, digest, split, group in zip(
        kept, targets, digests, places.splits, places.groups, strict=True
    ):
        header, clean, mask = item.header, item.clean, item.raw.mask
        assert header is not None
        assert clean is not None
        counts = dict(Counter(reason for _, reason in clean.dropped))
        if clean.clipped:
            counts["clipped"] = clean.clipped
        records.append(
            PictureRecord(
                item.raw.source,
                split,
                group,
                digest,
                header.width,
                header.height,
                header.orientation,
                clean.boxes_xyxy,
                clean.labels,
                clean.flags,
                counts,
                target,
                mask,
                None if mask is None else listing.sha256_of(mask),
            )
        )
    return records, list(places.warnings)


def _count(result: Scan, kept: Sequence[_Judged], settings: BuildSettings) -> dict[str, int]:
    pictures = Counter(item.reason for item in result.rejected if item.kind == "picture")
    missing = pictures.pop(MISSING, 0)
    skipped = pictures.pop(SKIPPED, 0)
    background = (
        sum(item.raw.annotation is None for item in kept)
        if settings.missing_is_empty and result.format not in BOXLESS
        else 0
    )
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
