"""What every annotation format becomes: a picture with raw boxes. Formats read; they do not judge.

A format module turns files into `RawPicture`s and lists what it could not pair. Cleaning, counting
and thresholds happen once, for all formats, in `ingest.pictures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Parsed", "PictureRecord", "RawBox", "RawPicture", "Rejection"]


@dataclass(frozen=True, slots=True)
class RawBox:
    """One box as the annotation file has it.

    Attributes
    ----------
    box_xyxy
        x1, y1, x2, y2 in pixels of the picture that the file describes, or in fractions of it. May
        be NaN, reversed or outside.
    class_name
        Name of the class, which need not be a known one.
    flags
        Bits of `warehouse.format.schema`: CROWD, DIFFICULT, TRUNCATED.
    """

    # Not corrected while reading: cleaning counts each kind of fault once, for all formats.
    box_xyxy: tuple[float, float, float, float]
    class_name: str
    flags: int = 0


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A picture found under the input root, and what its annotation says.

    Attributes
    ----------
    source
        POSIX path relative to the input root.
    boxes
        The boxes, in the order of the file.
    declared_size
        Width and height as the annotation file states them; None where it does not.
    annotation
        Path of the annotation file; None makes the picture one without annotation, which is a fault
        unless the format has no boxes.
    normalised
        Whether coordinates are fractions of the picture as shown, as in YOLO, instead of pixels.
    class_name
        Class of the whole picture, of formats that have one.
    mask
        Path of the picture's mask, of formats that have masks.
    """

    source: str
    boxes: tuple[RawBox, ...] = ()
    declared_size: tuple[int, int] | None = None
    annotation: str | None = None
    normalised: bool = False
    class_name: str | None = None
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line of `rejected.jsonl`.

    Attributes
    ----------
    path
        The picture or annotation file concerned.
    kind
        `picture`, `annotation` or `box`.
    reason
        A short fixed word that programs may rely on.
    detail
        The values found, in one line.
    """

    path: str
    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a format returns.

    Every listed picture stands in it exactly once: in `pictures`, or in `rejected` with the kind
    `picture`.

    Attributes
    ----------
    pictures
        The pictures that could be read.
    rejected
        What could not be read or paired.
    class_names
        The data set's own list of classes, in its order; None where the format has none, in which
        case classes are ordered by first appearance.
    placeholders
        Those of `class_names` that are dropped when no kept box uses them.
    warnings
        Remarks for the user, one line each.
    """

    pictures: tuple[RawPicture, ...]
    rejected: tuple[Rejection, ...] = ()
    class_names: tuple[str, ...] | None = None
    placeholders: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """One kept picture: everything needed to bake it, nothing left to judge.

    Attributes
    ----------
    source
        POSIX path relative to the input root.
    split
        `train`, `val` or `test`.
    group
        Key of the group; pictures of one group are in one split.
    sha256
        Digest of the file, as hexadecimal digits.
    raw_width, raw_height
        Size in pixels after EXIF orientation.
    orientation
        EXIF orientation of the file, 1 to 8.
    boxes_xyxy
        float64 [n, 4] in pixels of the picture as shown: finite, ordered, inside.
    labels
        int16 [n], indices into the class names.
    flags
        uint8 [n], bits of `warehouse.format.schema`.
    counts
        What cleaning did to this picture: `clipped`, and the reasons of dropped boxes.
    target
        Class of the whole picture, an index into the class names; None where the format has none.
    mask, mask_sha256
        Path of the picture's mask and the file's digest; None where the format has none.
    """

    source: str
    split: str
    group: str
    sha256: str
    raw_width: int
    raw_height: int
    orientation: int
    boxes_xyxy: NDArray[np.float64]
    labels: NDArray[np.int16]
    flags: NDArray[np.uint8]
    counts: Mapping[str, int] = field(default_factory=dict)
    target: int | None = None
    mask: str | None = None
    mask_sha256: str | None = None
