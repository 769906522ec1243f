"""One picture judged: its header read, its boxes oriented, cleaned and counted.

Headers are read, pixels are not: only a picture whose last bytes look cut off is decoded here,
because decoding all pictures twice would halve the speed of a build.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ingest.pictures.box_cleaning import (
    BAD,
    CleanBoxes,
    clean_boxes,
    keep_largest,
    orient_boxes,
)
from ingest.pictures.headers import Header
from ingest.pictures.images import probe
from ingest.pictures.letterbox import plan_letterbox
from ingest.records.base import RawPicture, Rejection
from ingest.records.formats import get_format
from ingest.sources.listing import SourceListing
from warehouse.errors import AnnotationError, PictureError
from warehouse.settings import BuildSettings

__all__ = [
    "MISSING",
    "SKIPPED",
    "JudgedPicture",
    "KeptPicture",
    "bound_boxes",
    "judge_picture",
]

MISSING, SKIPPED = "missing_annotation", "empty"
"""Reasons of pictures that are left out without being invalid."""


@dataclass(frozen=True, slots=True)
class KeptPicture:
    """A picture that goes into the version.

    Attributes
    ----------
    raw
        What the annotation says.
    header
        What the file's header says.
    clean
        The boxes that are kept, in pixels of the picture as shown.
    dropped
        The boxes that are not.
    declares_other_size
        Whether the annotation states a size that the picture has neither as stored nor as shown.
    """

    raw: RawPicture
    header: Header
    clean: CleanBoxes
    dropped: tuple[Rejection, ...] = ()
    declares_other_size: bool = False


@dataclass(frozen=True, slots=True)
class JudgedPicture:
    """The outcome for one picture: it is kept, or refused for a reason.

    Attributes
    ----------
    kept
        None where the picture is refused.
    refused
        None where the picture is kept.
    dropped
        The boxes of a refused picture that were dropped.
    """

    kept: KeptPicture | None
    refused: Rejection | None = None
    dropped: tuple[Rejection, ...] = ()


def judge_picture(
    raw: RawPicture,
    listing: SourceListing,
    settings: BuildSettings,
    class_ids: Mapping[str, int],
    failed: PictureError | None,
) -> JudgedPicture:
    """Judge one picture.

    Parameters
    ----------
    class_ids
        Index of each class name.
    failed
        The error that the picture raised when it was baked, or None.
    """
    try:
        # A picture that failed while it was baked stays refused when the scan is repeated, although
        # its header reads well. Otherwise the build would never end.
        if failed is not None:
            raise failed
        header = probe(listing.root, raw.source, max_pixels=settings.max_pixels)
    except PictureError as error:
        return _refused(raw, error.reason, str(error.found or ""))

    # The class of a whole picture has no box that could be dropped, so the picture goes.
    if raw.class_name is not None and raw.class_name not in class_ids:
        return _refused(raw, "unknown_class", raw.class_name)
    needs_annotation = get_format(listing.format).has_boxes and not settings.missing_is_empty
    if raw.annotation is None and needs_annotation:
        return _refused(raw, MISSING, "no annotation of this picture")

    clean = _clean(raw, header, settings, class_ids)
    dropped = tuple(
        Rejection(raw.source, "box", reason, _describe(raw, at)) for at, reason in clean.dropped
    )
    # A picture whose boxes were all wrong is not background: training on it as such would teach the
    # detector that its objects are not there.
    all_dropped = bool(raw.boxes) and len(clean.dropped) == len(raw.boxes)
    if all_dropped and all(reason in BAD for _, reason in clean.dropped):
        detail = f"all of {len(raw.boxes)} boxes were bad"
        return _refused(raw, "no_valid_boxes", detail, dropped)
    if settings.skip_empty and not len(clean.labels):
        return _refused(raw, SKIPPED, "no boxes, left out by skip_empty", dropped)

    # An annotation tool may have seen the picture before or after its EXIF rotation.
    sizes = (None, (header.width, header.height), (header.raw_width, header.raw_height))
    other_size = raw.declared_size not in sizes
    return JudgedPicture(KeptPicture(raw, header, clean, dropped, other_size))


def _refused(
    raw: RawPicture, reason: str, detail: str, dropped: tuple[Rejection, ...] = ()
) -> JudgedPicture:
    return JudgedPicture(None, Rejection(raw.source, "picture", reason, detail), dropped)


def _clean(
    raw: RawPicture, header: Header, settings: BuildSettings, class_ids: Mapping[str, int]
) -> CleanBoxes:
    size, stored = (header.width, header.height), (header.raw_width, header.raw_height)
    boxes = np.array([box.box_xyxy for box in raw.boxes], np.float64).reshape(-1, 4)
    if raw.normalised:
        # YOLO's fractions refer to the picture as shown.
        boxes = boxes * np.array([*size, *size], np.float64)
    if raw.declared_size == stored and stored != size:
        # The annotation tool did not apply EXIF. Orientations 2, 3 and 4 keep the size, so there
        # nothing tells whether it did: the picture as shown is assumed.
        boxes = orient_boxes(boxes, *stored, header.orientation)
    return clean_boxes(
        boxes,
        [class_ids.get(box.class_name, -1) for box in raw.boxes],
        [box.flags for box in raw.boxes],
        size,
        plan_letterbox(*size, settings.target_size, settings.resize_mode),
    )


def _describe(raw: RawPicture, at: int) -> str:
    box = raw.boxes[at]
    return f"box {at} {box.class_name}: {', '.join(f'{value:g}' for value in box.box_xyxy)}"


def bound_boxes(kept: list[KeptPicture], settings: BuildSettings) -> list[KeptPicture]:
    """Apply `max_boxes`: keep the largest boxes, or raise.

    Raises
    ------
    AnnotationError
        Naming the picture with most boxes, where `too_many_boxes` is `error`.
    """
    most = settings.max_boxes
    over = [item for item in kept if len(item.clean.labels) > most]
    if over and settings.too_many_boxes == "error":
        # The picture with most boxes is named, because the number that it needs is enough for all.
        worst = max(over, key=lambda item: len(item.clean.labels))
        needed = len(worst.clean.labels)
        raise AnnotationError(
            f"more boxes than slots, in {len(over)} pictures",
            where=worst.raw.source,
            expected=f"at most {most}",
            found=needed,
            remedy=(
                f"use --build.max_boxes {needed}, or --build.too_many_boxes truncate to keep the"
                " largest"
            ),
        )
    return [_truncate(item, most) if len(item.clean.labels) > most else item for item in kept]


def _truncate(item: KeptPicture, most: int) -> KeptPicture:
    clean = item.clean
    chosen = keep_largest(clean.boxes_xyxy, most)
    removed = {at for at, _ in clean.dropped}
    # Positions in the annotation of the boxes that cleaning kept.
    positions = [at for at in range(len(item.raw.boxes)) if at not in removed]
    surplus = tuple(
        (positions[at], "over_max_boxes")
        for at in sorted(set(range(len(positions))) - set(chosen.tolist()))
    )
    lines = tuple(
        Rejection(item.raw.source, "box", reason, _describe(item.raw, at)) for at, reason in surplus
    )
    smaller = CleanBoxes(
        clean.boxes_xyxy[chosen],
        clean.labels[chosen],
        clean.flags[chosen],
        (*clean.dropped, *surplus),
    )
    return replace(item, clean=smaller, dropped=(*item.dropped, *lines))
