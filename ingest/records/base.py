"""What every annotation format becomes: a picture with raw boxes. Formats read; they do not judge.

A format module turns files into `RawPicture`s and lists what it could not pair. Cleaning, counting
and thresholds happen once, for all formats, in `ingest/pictures/validate.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Parsed", "PictureRecord", "RawBox", "RawPicture", "Rejection"]


@dataclass(frozen=True, slots=True)
class RawBox:
    """One box as the annotation file has it, in pixels of the frame the file declares.

    May be NaN, reversed or outside.
    """

    box_xyxy: tuple[float, float, float, float]
    class_name: str
    flags: int = 0


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A picture found under the input root and what its annotation says.

    source: posix path relative to the input root; split: a given split folder's name (train, val,
    test) or None; declared_size: (width, height) in the annotation file, None where absent;
    annotation: its relative path, None when the picture has none (`boxes` is then empty and the
    picture counts as missing, unless the format has no boxes); normalised: coordinates are
    fractions of the oriented picture instead of pixels (YOLO). class_name: of the whole picture, of
    class folders; mask: relative path of its mask.
    """

    source: str
    split: str | None
    boxes: tuple[RawBox, ...] = ()
    declared_size: tuple[int, int] | None = None
    annotation: str | None = None
    normalised: bool = False
    class_name: str | None = None
    mask: str | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """A line of `rejected.jsonl`. kind: picture, annotation or box; reason: a short fixed word.

    detail: values, one line.
    """

    path: str
    kind: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a format module returns: every listed picture stands once, in `pictures` or in
    `rejected` with kind `picture`.

    class_names: the source's own list in the source's order, None where a format has none (names
    then follow their first appearance). placeholders: those of them that are dropped when no kept
    box uses them.
    """

    pictures: tuple[RawPicture, ...]
    rejected: tuple[Rejection, ...] = ()
    class_names: tuple[str, ...] | None = None
    placeholders: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PictureRecord:
    """One kept picture: everything needed to bake it, nothing left to judge.

    raw_width, raw_height: size after EXIF orientation (1..8). boxes_xyxy: float64 [n, 4], source
    pixels of the oriented picture, finite, ordered, inside. labels: int16 [n]. flags: uint8 [n]
    (warehouse.format.schema bits). group: pictures of one group are in one split. counts: what
    cleaning did to this picture (clipped, duplicate, dropped reasons). target: the picture's class,
    an index into class_names, None where the format has none; mask: relative path of its mask, with
    the file's sha256.
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
    counts: dict[str, int] = field(default_factory=dict)
    target: int | None = None
    mask: str | None = None
    mask_sha256: str | None = None
