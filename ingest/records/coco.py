"""COCO detection JSON: one file a split, categories by number, boxes in pixels.

A box is x, y, width and height; numbers may be integers or not. Only images listed under the input
root are read: a `file_name` finds one of them beside the JSON, in `images/`, or in the folder that
`instances_<folder>.json` names, and a name with `..` or an absolute path is refused. Categories
come in the order of their numbers; number 0, and one that is another's supercategory, are
placeholders unless a box uses them, since Roboflow's exports begin with such an entry.

A JSON file that does not parse is an error, because a whole split depends on it. The polygons and
masks under `segmentation` are not read.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from ingest.records.base import Parsed, RawBox, RawPicture, Rejection
from ingest.records.registry import AnnotationFormat, InputFolder, register
from ingest.sources.files import read_inside
from ingest.sources.listing import SourceListing
from warehouse.errors import AnnotationError
from warehouse.format.schema import CROWD

__all__ = ["CocoFormat", "parse_coco"]

MAX_JSON_BYTES = 1 << 30
PREFIX_BYTES = 1 << 20
"""Bytes at the start of a JSON file in which `"images"` is searched."""
NAN = float("nan")
COCO_NAME = re.compile(
    r"^(?:(?:.*[._-])?coco(?:[._-].*)?|instances_.+|annotations?|labels)\.json$", re.IGNORECASE
)
INSTANCES = "instances_"


class CocoFormat(AnnotationFormat):
    """The detection task of COCO's data format (cocodataset.org/#format-data)."""

    name = "coco"
    expected_files = "_annotations.coco.json beside the pictures or annotations/instances_*.json"

    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        """Return JSON files of COCO's names; where the user chose COCO, any that looks like it."""
        named = [path for path in folder.others if COCO_NAME.match(posixpath.basename(path))]
        instances = {posixpath.dirname(path) for path in named if _has_instances(path)}
        # Beside COCO's own instances_*.json lie captions and keypoints of the same pictures.
        named = [
            path
            for path in named
            if posixpath.dirname(path) not in instances or _has_instances(path)
        ]
        # Only if the user chose COCO: reading every JSON file of a folder to recognise a format
        # would be slow, and many other formats have a list of images.
        if not named and folder.is_chosen:
            named = [
                path
                for path in folder.others
                if path.lower().endswith(".json") and _looks_like_coco(folder.root / path)
            ]
        return tuple(named)

    def matches(self, folder: InputFolder, annotations: tuple[str, ...]) -> bool:
        """Return whether one of the files lists images, as every COCO file does."""
        # `labels.json` and `annotations.json` are names that other formats use, too. Searched as
        # bytes, and to the end: "images" may come after gigabytes of annotations.
        return any(
            b'"images"' in read_inside(folder.root, path, limit=MAX_JSON_BYTES)
            for path in annotations
        )

    def parse(self, listing: SourceListing) -> Parsed:
        """Read every JSON file."""
        return parse_coco(listing)


def _has_instances(path: str) -> bool:
    return posixpath.basename(path).startswith(INSTANCES)


def _looks_like_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"images"' in file.read(PREFIX_BYTES)
    except OSError:
        return False


def parse_coco(listing: SourceListing) -> Parsed:
    """Read every picture of a listing with its boxes.

    Raises
    ------
    AnnotationError
        Naming file and entry, for a JSON file that cannot be used.
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
            # Files of several splits may number the same categories differently.
            names.setdefault(name, (number, order))
            if number == 0 or name in supercategories:
                placeholders.add(name)

        boxes = _boxes(content, path, categories, rejected)
        for entry in content["images"]:
            file_name = _safe_name(entry, path)
            source = next((each for each in _candidates(path, file_name) if each in known), None)
            if source is None:
                rejected.append(Rejection(path, "annotation", "missing_picture", file_name))
            elif source in taken:
                # Which of the two lists of boxes is complete, nothing in the files tells.
                raise AnnotationError(
                    "a picture is listed twice",
                    where=f"{path}, {source}",
                    found=f"also in {taken[source].annotation}",
                )
            else:
                own = tuple(boxes.get(entry["id"], ()))
                taken[source] = RawPicture(source, own, _size(entry), path)

    pictures = tuple(taken.get(source, RawPicture(source)) for source in listing.pictures)
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
    # ValueError also for a number of more than 4,300 digits, which Python refuses to convert.
    except (UnicodeDecodeError, ValueError) as error:
        raise AnnotationError("JSON does not parse", where=path, found=str(error)[:200]) from None
    except RecursionError:
        raise AnnotationError("JSON does not parse", where=path, found="nesting too deep") from None
    _refuse_lone_surrogates(content, data, path)
    for key in ("images", "categories", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
            raise AnnotationError(
                "not a COCO detection file", where=path, expected=f"a list of objects under {key!r}"
            )
    _check_ids(content["images"], path)
    return dict(content)


def _refuse_lone_surrogates(content: object, data: bytes, path: str) -> None:
    """Raise AnnotationError for half of a surrogate pair, which UTF-8 cannot express."""
    # Encoding everything again is slow, so only files that hold such an escape are tried.
    if b"\\ud" not in data.lower():
        return
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise AnnotationError(
            "JSON holds half a character",
            where=path,
            found=str(error)[:120],
            remedy="correct the escape that begins with \\ud8 to \\udf",
        ) from None


def _check_ids(images: list[dict[str, Any]], path: str) -> None:
    # COCO's ids are numbers; some tools write texts, which serve as well.
    ids = [entry.get("id") for entry in images]
    for at, number in enumerate(ids):
        if not isinstance(number, int | str):
            raise AnnotationError(
                "a picture has no id", where=f"{path}, images[{at}]", found=repr(number)[:80]
            )
    if len(set(ids)) != len(ids):
        twice = next(number for number, count in Counter(ids).items() if count > 1)
        raise AnnotationError("two pictures have one id", where=path, found=repr(twice)[:80])


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
) -> dict[int | str, list[RawBox]]:
    """Return the boxes of each picture by its id, in file order.

    A box that is not four numbers becomes NaN and is judged with the others.
    """
    ids = {entry["id"] for entry in content["images"]}
    boxes: dict[int | str, list[RawBox]] = defaultdict(list)
    for at, entry in enumerate(content["annotations"]):
        image_id, number = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image_id, int | str) or image_id not in ids:
            detail = f"annotations[{at}]: image_id {image_id!r:.40}"
            rejected.append(Rejection(path, "box", "unknown_picture", detail))
            continue

        # A name that no list of classes has: the box is counted as one of an unknown class.
        name = categories.get(number, "") if isinstance(number, int) else ""
        flags = CROWD if entry.get("iscrowd") in (1, True) else 0
        box = RawBox(_xyxy(entry.get("bbox")), name or f"category id {number!r:.40}", flags)
        boxes[image_id].append(box)
    return boxes


def _xyxy(bbox: object) -> tuple[float, float, float, float]:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return NAN, NAN, NAN, NAN
    if not all(isinstance(value, int | float) for value in bbox):
        return NAN, NAN, NAN, NAN
    try:
        x, y, width, height = (float(value) for value in bbox)
    # A whole number in JSON may be larger than any float.
    except OverflowError:
        return NAN, NAN, NAN, NAN
    return x, y, x + width, y + height


def _safe_name(entry: dict[str, Any], path: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise AnnotationError(
            "a picture has no file_name", where=f"{path}, image id {entry['id']!r:.40}"
        )
    # Tools on Windows write backslashes and drive letters.
    plain = name.replace("\\", "/").removeprefix("./")
    parts = plain.split("/")
    if plain.startswith("/") or "\0" in plain or ".." in parts or ":" in parts[0]:
        raise AnnotationError(
            "a file_name leads out of the input folder",
            where=f"{path}, image id {entry['id']!r:.40}",
            found=repr(name)[:200],
        )
    return plain


def _candidates(path: str, file_name: str) -> list[str]:
    """Return the paths at which an image of a JSON file may lie, nearest first."""
    folder, name = posixpath.split(path)
    parent = posixpath.dirname(folder)
    stem = posixpath.splitext(name)[0].removeprefix(INSTANCES)
    below = [(stem,), ("images", stem), ("images",), ("data",), ()]
    folders = [folder]
    for base in dict.fromkeys((folder, parent)):
        folders += [posixpath.join(base, *tail) for tail in below]
    return [posixpath.join(each, file_name) for each in dict.fromkeys(folders)]


def _size(entry: dict[str, Any]) -> tuple[int, int] | None:
    width, height = entry.get("width"), entry.get("height")
    if isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0:
        return width, height
    return None


register(CocoFormat())
