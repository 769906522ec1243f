"""Text detection annotations: MMOCR's `textdet_*.json`, and ICDAR 2015's `gt_*.txt` with a
quadrilateral a line.

Formats read; they do not judge shapes (ingest.text.items does). What is not a polygon at all - a
line of something else, an odd number of coordinates, under three points, NaN - is an error naming
file and entry. A picture is found by the name that its entry gives, never by its place in a list or
in a folder: MMOCR's lists are in no order.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import AnnotationError

__all__ = ["TextPicture", "TextRegion", "parse_icdar", "parse_mmocr"]

IGNORED_TEXT = "###"
MOST_COORDINATE = 1e7
NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?")


@dataclass(frozen=True, slots=True)
class TextRegion:
    """One polygon of an annotation.

    Attributes
    ----------
    polygon
        float64 [n, 2] with n >= 3: (x, y) in pixels, finite.
    ignore
        Whether the region takes part in neither loss nor scores.
    text
        None where the format has none.
    """

    polygon: NDArray[np.float64]
    ignore: bool
    text: str | None


@dataclass(frozen=True, slots=True)
class TextPicture:
    """The polygons of one picture.

    Attributes
    ----------
    source
        Path of the picture as its annotation gives it; for ICDAR, the stem of its name.
    regions
        In the order of the file.
    declared_size
        (width, height) in pixels, or None where the annotation states no size.
    annotation
        File and entry, for messages.
    """

    source: str
    regions: tuple[TextRegion, ...]
    declared_size: tuple[int, int] | None
    annotation: str


def parse_mmocr(data: bytes, name: str) -> list[TextPicture]:
    """Read a `{"metainfo": ..., "data_list": [...]}` file of MMOCR.

    Returns
    -------
    list of TextPicture
        In the order of the file.

    Raises
    ------
    AnnotationError
        Naming the entry that is wrong.
    """
    # JSON may also be not UTF-8 (a ValueError), or nested deeper than Python's stack.
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise AnnotationError(
            "JSON does not parse", where=f"{name}, line {error.lineno}", found=error.msg
        ) from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError("JSON does not parse", where=name, found=str(error)[:200]) from None
    entries = content.get("data_list") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise AnnotationError(
            "not an MMOCR text detection file",
            where=name,
            expected="a list of objects under 'data_list'",
            remedy="convert it with MMOCR's dataset preparer, or give a folder of gt_*.txt",
        )
    return [_entry(entry, f"{name}, data_list[{at}]") for at, entry in enumerate(entries)]


def parse_icdar(data: bytes, name: str, stem: str) -> TextPicture:
    """Read a `gt_<stem>.txt` of ICDAR 2015: lines `x1,y1,...,x4,y4,text` in UTF-8.

    The text may hold commas, and `###` means that the region is ignored.

    Raises
    ------
    AnnotationError
        Naming the line that is wrong.
    """
    try:
        # The files of the challenge begin with a byte order mark.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(
            "not UTF-8",
            where=name,
            found=f"byte {error.start}: {error.reason}",
            remedy="convert it to UTF-8",
        ) from None
    regions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        # The ninth field is the rest of the line: the text may hold commas itself.
        *values, words = line.split(",", 8) if line.count(",") >= 8 else [*line.split(","), ""]
        numbers = [value.strip() for value in values]
        if len(numbers) != 8 or not all(NUMBER.fullmatch(value) for value in numbers):
            raise AnnotationError(
                "not a line of ICDAR 2015",
                where=f"{name}, line {number}",
                expected="x1,y1,x2,y2,x3,y3,x4,y4,text",
                found=repr(line[:80]),
            )
        polygon = _polygon([float(value) for value in numbers], f"{name}, line {number}")
        regions.append(TextRegion(polygon, words.strip() == IGNORED_TEXT, words))
    return TextPicture(stem, tuple(regions), None, name)


def _entry(entry: dict[str, Any], where: str) -> TextPicture:
    path, instances = entry.get("img_path"), entry.get("instances")
    if not isinstance(path, str) or not path:
        raise AnnotationError("a picture has no img_path", where=where, found=repr(path)[:80])
    where = f"{where} ({path[:200]})"
    if not isinstance(instances, list) or not all(
        isinstance(instance, dict) for instance in instances
    ):
        raise AnnotationError(
            "a picture has no instances",
            where=where,
            expected="a list of objects",
            found=repr(instances)[:80],
        )
    regions = []
    for at, instance in enumerate(instances):
        spot = f"{where}, instances[{at}]"
        ignore, text = instance.get("ignore", False), instance.get("text")
        # 0 and 1 equal False and True here, and MMOCR's converters write either.
        if ignore not in (False, True):
            raise AnnotationError(
                "ignore is neither true nor false", where=spot, found=repr(ignore)[:80]
            )
        if not isinstance(text, str | None):
            raise AnnotationError("text is no string", where=spot, found=repr(text)[:80])
        regions.append(TextRegion(_polygon(instance.get("polygon"), spot), bool(ignore), text))
    declared = _declared_size(entry.get("width"), entry.get("height"))
    return TextPicture(path.replace("\\", "/").removeprefix("./"), tuple(regions), declared, where)


def _declared_size(width: object, height: object) -> tuple[int, int] | None:
    # Booleans are integers in Python: `true` is no width.
    if type(width) is not int or type(height) is not int:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _polygon(values: Any, where: str) -> NDArray[np.float64]:
    """Return [x1, y1, x2, y2, ...] as float64 [n, 2]."""
    if not isinstance(values, list) or not all(type(value) in {int, float} for value in values):
        raise AnnotationError(
            "a polygon is not a list of numbers",
            where=where,
            expected="[x1, y1, x2, y2, ...]",
            found=repr(values)[:80],
        )
    if len(values) % 2 or len(values) < 6:
        raise AnnotationError(
            "a polygon needs three points or more",
            where=where,
            expected="an even count of numbers, at least 6",
            found=f"{len(values)} numbers",
            remedy="mend the annotation or take the entry out",
        )
    # Written so that NaN, for which every comparison is false, is wrong as well.
    wrong = next(
        (value for value in values if not -MOST_COORDINATE <= value <= MOST_COORDINATE), None
    )
    if wrong is not None:
        raise AnnotationError(
            "a coordinate is not a place in a picture",
            where=where,
            expected=f"finite, within {MOST_COORDINATE:.0f}",
            found=str(wrong)[:60],
        )
    return np.array(values, np.float64).reshape(-1, 2)
