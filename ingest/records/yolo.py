"""YOLO: a text file a picture, a line a box: class number, then centre x, centre y, width, height
as fractions of the picture.

A line of more numbers is a polygon, of which the bounding box is taken. Fractions refer to the
picture turned by EXIF, as the common trainers read it. Names come from data.yaml (`names`: list or
mapping), classes.txt, obj.names and the like, in that order; all of them are kept, used or not.
Without any, classes are `class_0`, `class_1`, ... A class number without a name makes its box
`unknown_class`; a line that does not parse makes its picture invalid, with file and line.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable
from typing import Any

from ingest.pairing import pair_by_stem
from ingest.records.base import Parsed, RawBox, RawPicture, Rejection
from ingest.sources import SourceListing, read_inside
from warehouse.errors import AnnotationError

__all__ = ["parse_yolo", "read_class_names", "read_yolo_text"]

MAX_TEXT_BYTES = 16 << 20
MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 32
MAX_CLASSES = 32_767


def parse_yolo(listing: SourceListing) -> Parsed:
    """Every picture of a listing with its boxes, normalised.

    Raises AnnotationError for a bad list of names only.
    """
    names = read_class_names(listing)
    pairs = pair_by_stem(listing.pictures, listing.annotations)
    pictures: list[RawPicture] = []
    rejected = [
        Rejection(path, "annotation", "missing_picture", "no picture of this stem")
        for path in pairs.orphans
    ]
    largest = -1
    for source in listing.pictures:
        path = pairs.annotation_of.get(source)
        if source in pairs.ambiguous:
            rejected.append(
                Rejection(
                    source,
                    "picture",
                    "ambiguous_annotation",
                    f"{pairs.ambiguous[source]} belongs to another picture of this stem",
                )
            )
        elif path is None:
            pictures.append(RawPicture(source, None, normalised=True))
        else:
            data = read_inside(
                listing.root, path, limit=MAX_TEXT_BYTES, sha256=listing.sha256_of(path)
            )
            try:
                lines = read_yolo_text(data, path)
            except AnnotationError as error:
                rejected.append(Rejection(source, "picture", "bad_annotation", str(error)))
                continue
            largest = max([largest, *(number for number, _ in lines)])
            boxes = tuple(RawBox(box, _name(number, names)) for number, box in lines)
            pictures.append(RawPicture(source, None, boxes, None, path, normalised=True))
    if names is None:
        return Parsed(
            tuple(pictures),
            tuple(rejected),
            tuple(f"class_{number}" for number in range(largest + 1)),
            warnings=(
                "no list of class names found (data.yaml, classes.txt): classes are named by number",
            ),
        )
    return Parsed(
        tuple(pictures), tuple(rejected), tuple(names[number] for number in sorted(names))
    )


def read_yolo_text(data: bytes, path: str) -> list[tuple[int, tuple[float, float, float, float]]]:
    """(class number, xyxy as fractions) of each line. Raises AnnotationError with file and line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError("a label file is not text", where=path, found=str(error)) from None
    found = []
    for at, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {at}"
        try:
            number, values = float(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise AnnotationError(
                "a label is not a number", where=where, found=repr(line[:80])
            ) from None
        if not (number.is_integer() and 0 <= number < MAX_CLASSES):
            raise AnnotationError(
                "a class is not a whole number",
                where=where,
                expected=f"0 to {MAX_CLASSES - 1}",
                found=words[0][:20],
            )
        if len(values) == 4:
            x, y, width, height = values
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        elif len(values) >= 6 and len(values) % 2 == 0:
            # min and max pass over NaN, which must reach the cleaning.
            values = values if all(map(math.isfinite, values)) else [math.nan] * len(values)
            box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            raise AnnotationError(
                "a label line has the wrong length",
                where=where,
                expected="class x y w h, or a polygon",
                found=f"{len(words)} numbers",
            )
        found.append((int(number), box))
    return found


def read_class_names(listing: SourceListing) -> dict[int, str] | None:
    """Class number -> name, of the first file that has names, or None.

    Raises AnnotationError with file (and line).
    """
    others = sorted(listing.others(), key=lambda path: (_rank(path), path.count("/"), path))
    for path in others:
        is_yaml = path.lower().endswith((".yaml", ".yml"))
        data = read_inside(listing.root, path, limit=MAX_YAML_BYTES, sha256=listing.sha256_of(path))
        names = _names_of_yaml(data, path) if is_yaml else _names_of_lines(data, path)
        if names is None:
            continue
        if not all(isinstance(key, int) and 0 <= key < MAX_CLASSES for key in names):
            raise AnnotationError(
                "class names need numbers from 0", where=path, found=str(list(names)[:5])
            )
        cleaned = {key: str(name).strip() for key, name in names.items()}
        if any("\ud800" <= sign <= "\udfff" for name in cleaned.values() for sign in name):
            raise AnnotationError(
                "a class name holds half a character",
                where=path,
                found=ascii(list(cleaned.values()))[:120],
            )
        if not cleaned or not all(cleaned.values()) or len(set(cleaned.values())) != len(cleaned):
            raise AnnotationError(
                "class names must be distinct and not empty",
                where=path,
                found=str(list(cleaned.values())[:8]),
            )
        return cleaned
    return None


def _rank(path: str) -> int:
    name = posixpath.basename(path).lower()
    tests: list[Callable[[str], bool]] = [
        lambda n: n in ("data.yaml", "data.yml"),
        lambda n: n.endswith((".yaml", ".yml")),
        lambda n: n == "classes.txt",
    ]
    return next((rank for rank, test in enumerate(tests) if test(name)), len(tests))


def _name(number: int, names: dict[int, str] | None) -> str:
    return f"class_{number}" if names is None else names.get(number, f"class number {number}")


def _names_of_lines(data: bytes, path: str) -> dict[Any, Any] | None:
    try:
        lines = data.decode("utf-8-sig").strip().splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(
            "a list of class names is not text", where=path, found=str(error)
        ) from None
    return dict(enumerate(lines)) or None


def _names_of_yaml(data: bytes, path: str) -> dict[Any, Any] | None:
    import yaml

    try:
        # Events first: aliases can make a few lines grow without bound once composed, and deep
        # nesting takes quadratic time.
        depth = 0
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
                raise AnnotationError("YAML with aliases or deep nesting is refused", where=path)
        content = yaml.safe_load(data)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise AnnotationError(
            "YAML does not parse", where=f"{path}, line {line}", found=error.problem
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AnnotationError("YAML does not parse", where=path, found=str(error)) from None
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        return dict(enumerate(names))
    if names is None or isinstance(names, dict):
        return names
    raise AnnotationError(
        "`names` is neither a list nor a mapping", where=path, found=type(names).__name__
    )
