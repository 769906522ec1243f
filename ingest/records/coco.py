"""COCO detection JSON: one file a split, categories by number, boxes as x, y, width, height in
pixels.

Only pictures listed under the input root are read: a `file_name` finds one of them beside the JSON,
in `images/`, or in the folder that `instances_<folder>.json` names, and anything with `..` or an
absolute path is refused. Numbers may be whole or not. `segmentation` is ignored. A JSON file that
does not parse is an error, for a whole split hangs on it. Categories come in the order of their
numbers; number 0, and one that is another's supercategory, are placeholders unless a box uses them.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter, defaultdict
from typing import Any

from ingest.records.base import Parsed, RawBox, RawPicture, Rejection
from ingest.sources import SourceListing, read_inside
from warehouse.errors import AnnotationError
from warehouse.format.schema import CROWD

__all__ = ["parse_coco"]

MAX_JSON_BYTES = 1 << 30
NAN = float("nan")


def parse_coco(listing: SourceListing) -> Parsed:
    """Every picture of a listing with its boxes.

    Raises AnnotationError naming file and entry for a JSON that cannot be used.
    """
    known = set(listing.pictures)
    taken: dict[str, RawPicture] = {}
    rejected: list[Rejection] = []
    names: dict[str, tuple[int, int]] = {}
    placeholders: set[str] = set()
    for order, path in enumerate(listing.annotations):
        content = _read(listing, path)
        categories = _categories(content, path)
        supercategories = {str(entry.get("supercategory")) for entry in content["categories"]}
        for number, name in categories.items():
            names.setdefault(name, (number, order))
            if number == 0 or name in supercategories:
                placeholders.add(name)
        boxes = _boxes(content, path, categories, rejected)
        for entry in content["images"]:
            file_name = _safe_name(entry, path)
            source = next((place for place in _places(path, file_name) if place in known), None)
            if source is None:
                rejected.append(Rejection(path, "annotation", "missing_picture", file_name))
            elif source in taken:
                raise AnnotationError(
                    "a picture is listed twice",
                    where=f"{path}, {source}",
                    found=f"also in {taken[source].annotation}",
                )
            else:
                taken[source] = RawPicture(
                    source, None, tuple(boxes.get(entry["id"], ())), _size(entry), path
                )
    pictures = tuple(taken.get(source, RawPicture(source, None)) for source in listing.pictures)
    ordered = tuple(sorted(names, key=lambda name: (names[name], name)))
    return Parsed(pictures, tuple(rejected), ordered, frozenset(placeholders))


def _read(listing: SourceListing, path: str) -> dict[str, Any]:
    data = read_inside(listing.root, path, limit=MAX_JSON_BYTES, sha256=listing.sha256_of(path))
    try:
        content = json.loads(data)
    except json.JSONDecodeError as error:
        raise AnnotationError(
            "JSON does not parse", where=f"{path}, line {error.lineno}", found=error.msg
        ) from None
    except (UnicodeDecodeError, ValueError) as error:
        raise AnnotationError("JSON does not parse", where=path, found=str(error)[:200]) from None
    except RecursionError:
        raise AnnotationError("JSON does not parse", where=path, found="nesting too deep") from None
    if b"\\ud" in data.lower():
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise AnnotationError(
                "JSON holds half a character",
                where=path,
                found=str(error)[:120],
                remedy="mend the \\ud8.. escape",
            ) from None
    for key in ("images", "categories", "annotations"):
        if (
            not isinstance(content, dict)
            or not isinstance(content.get(key), list)
            or not all(isinstance(item, dict) for item in content[key])
        ):
            raise AnnotationError(
                "not a COCO detection file", where=path, expected=f"a list of objects under {key!r}"
            )
    ids = [entry.get("id") for entry in content["images"]]
    for at, number in enumerate(ids):
        if not isinstance(number, int | str):
            raise AnnotationError(
                "a picture has no id", where=f"{path}, images[{at}]", found=repr(number)[:80]
            )
    if len(set(ids)) != len(ids):
        twice = next(number for number, count in Counter(ids).items() if count > 1)
        raise AnnotationError("two pictures have one id", where=path, found=repr(twice)[:80])
    return dict(content)


def _categories(content: dict[str, Any], path: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for at, entry in enumerate(content["categories"]):
        number, name = entry.get("id"), entry.get("name")
        where = f"{path}, categories[{at}]"
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            raise AnnotationError(
                "a category needs a whole number and a name",
                where=where,
                found=f"{number!r:.40} and {name!r:.40}",
            )
        if number in found:
            raise AnnotationError("two categories have one id", where=where, found=str(number))
        found[number] = name.strip()
    return found


def _boxes(
    content: dict[str, Any], path: str, categories: dict[int, str], rejected: list[Rejection]
) -> dict[Any, list[RawBox]]:
    """Picture id -> its boxes, in file order.

    A box that is not four numbers becomes NaN and is judged with the others.
    """
    ids = {entry["id"] for entry in content["images"]}
    boxes: dict[Any, list[RawBox]] = defaultdict(list)
    for at, entry in enumerate(content["annotations"]):
        image_id, number = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image_id, int | str) or image_id not in ids:
            rejected.append(
                Rejection(
                    path, "box", "unknown_picture", f"annotations[{at}]: image_id {image_id!r:.40}"
                )
            )
            continue
        name = categories.get(number, "") if isinstance(number, int) else ""
        flags = CROWD if entry.get("iscrowd") in (1, True) else 0
        boxes[image_id].append(
            RawBox(_xyxy(entry.get("bbox")), name or f"category id {number!r:.40}", flags)
        )
    return boxes


def _xyxy(bbox: Any) -> tuple[float, float, float, float]:
    if (
        not isinstance(bbox, list)
        or len(bbox) != 4
        or not all(isinstance(value, int | float) for value in bbox)
    ):
        return NAN, NAN, NAN, NAN
    try:
        x, y, width, height = (float(value) for value in bbox)
    except OverflowError:
        return NAN, NAN, NAN, NAN
    return x, y, x + width, y + height


def _safe_name(entry: dict[str, Any], path: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise AnnotationError(
            "a picture has no file_name", where=f"{path}, image id {entry['id']!r:.40}"
        )
    plain = name.replace("\\", "/").removeprefix("./")
    if (
        plain.startswith("/")
        or "\0" in plain
        or ".." in plain.split("/")
        or ":" in plain.split("/")[0]
    ):
        raise AnnotationError(
            "a file_name leads out of the input folder",
            where=f"{path}, image id {entry['id']!r:.40}",
            found=repr(name)[:200],
        )
    return plain


def _places(path: str, file_name: str) -> list[str]:
    """Where a picture of a JSON file may lie, nearest first."""
    folder, name = posixpath.split(path)
    parent = posixpath.dirname(folder)
    stem = posixpath.splitext(name)[0].removeprefix("instances_")
    spots = [folder]
    for base in dict.fromkeys((folder, parent)):
        spots += [
            posixpath.join(base, *tail)
            for tail in ((stem,), ("images", stem), ("images",), ("data",), ())
        ]
    return [posixpath.join(spot, file_name) for spot in dict.fromkeys(spots)]


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None
