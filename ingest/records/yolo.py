"""YOLO: a text file a picture, a line a box.

A line is a class number, then centre x, centre y, width and height as fractions of the picture. A
line of more numbers is a polygon, of which the bounding box is taken. Fractions refer to the
picture turned by EXIF, as the common trainers read it.

Names come from data.yaml (`names`: list or mapping), classes.txt, obj.names and the like, in that
order; all of them are kept, used or not. Without any, classes are `class_0`, `class_1` and so on. A
class number without a name makes its box `unknown_class`. A line that does not parse makes its
picture invalid, with file and line.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Mapping

from ingest.records.base import Parsed, RawBox, RawPicture
from ingest.records.paired_files import parse_paired_files
from ingest.records.registry import AnnotationFormat, InputFolder, files_by_stem, register
from ingest.sources.files import read_inside
from ingest.sources.listing import SourceListing
from warehouse.errors import AnnotationError

__all__ = ["YoloFormat", "read_class_names", "read_yolo_text"]

MAX_TEXT_BYTES = 16 << 20
MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 32
MAX_CLASSES = 32_767
"""Labels are stored as int16."""
NAMES_FILE = re.compile(
    r"^(?:data\.ya?ml|dataset\.ya?ml|classes\.txt|_darknet\.labels|.+\.names)$", re.IGNORECASE
)
YAML = (".yaml", ".yml")


class YoloFormat(AnnotationFormat):
    """YOLO's text files, as Darknet introduced them and Ultralytics and Roboflow write them."""

    name = "yolo"
    expected_files = "*.txt beside the pictures or in labels/"

    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        """Return text files beside the images or in a folder of labels."""
        return files_by_stem(folder, ".txt")

    def names_classes(self, path: str) -> bool:
        """Return whether a file may hold the names of the classes."""
        # Ultralytics has names of its own for data.yaml, such as coco128.yaml.
        name = posixpath.basename(path)
        return bool(NAMES_FILE.match(name)) or ("/" not in path and name.lower().endswith(YAML))

    def parse(self, listing: SourceListing) -> Parsed:
        """Read the text file of every picture.

        Raises
        ------
        AnnotationError
            For a list of class names that cannot be used.
        """
        names = read_class_names(listing)
        largest = -1

        def parse_file(source: str, path: str, data: bytes) -> RawPicture:
            nonlocal largest
            lines = read_yolo_text(data, path)
            largest = max([largest, *(number for number, _ in lines)])
            boxes = tuple(RawBox(box, _class_name(number, names)) for number, box in lines)
            return RawPicture(source, boxes, annotation=path, normalised=True)

        pictures, rejected = parse_paired_files(
            listing, parse_file, limit=MAX_TEXT_BYTES, normalised=True
        )
        if names is not None:
            return Parsed(pictures, rejected, tuple(names[number] for number in sorted(names)))

        # Up to the largest number in use, so that a label stays the number in the files.
        return Parsed(
            pictures,
            rejected,
            tuple(f"class_{number}" for number in range(largest + 1)),
            warnings=(
                "no list of class names found (data.yaml, classes.txt): classes are named by"
                " number",
            ),
        )


def read_yolo_text(data: bytes, path: str) -> list[tuple[int, tuple[float, float, float, float]]]:
    """Read one label file.

    Parameters
    ----------
    path
        The file's path, for messages.

    Returns
    -------
    list
        For each line the class number, and x1, y1, x2, y2 as fractions of the picture.

    Raises
    ------
    AnnotationError
        Naming file and line, for a line that is neither a box nor a polygon.
    """
    # Editors on Windows begin a text file with a byte order mark.
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError("a label file is not text", where=path, found=str(error)) from None
    return [
        _read_line(line, f"{path}, line {at}")
        for at, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _read_line(line: str, where: str) -> tuple[int, tuple[float, float, float, float]]:
    words = line.split()
    # Some tools write the class number as 0.0.
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
        return int(number), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    # Three points or more. Five numbers could be a box with a score, so they are refused.
    if len(values) >= 6 and len(values) % 2 == 0:
        # min and max pass over NaN, which must reach the cleaning.
        if not all(map(math.isfinite, values)):
            values = [math.nan] * len(values)
        xs, ys = values[::2], values[1::2]
        return int(number), (min(xs), min(ys), max(xs), max(ys))
    raise AnnotationError(
        "a label line has the wrong length",
        where=where,
        expected="class x y w h, or a polygon",
        found=f"{len(words)} numbers",
    )


def read_class_names(listing: SourceListing) -> dict[int, str] | None:
    """Return the names of the classes from the first file that has any.

    Returns
    -------
    dict or None
        Class number -> name.

    Raises
    ------
    AnnotationError
        Naming the file, for names that cannot be used.
    """
    others = sorted(listing.others(), key=lambda path: (_rank(path), path.count("/"), path))
    for path in others:
        data = read_inside(listing.root, path, limit=MAX_YAML_BYTES, sha256=listing.sha256_of(path))
        read_names = _names_of_yaml if path.lower().endswith(YAML) else _names_of_lines
        names = read_names(data, path)
        if names is not None:
            return _checked_names(names, path)
    return None


def _rank(path: str) -> int:
    """Return the place of a file in the order data.yaml, YAML files, classes.txt, others."""
    name = posixpath.basename(path).lower()
    if name in ("data.yaml", "data.yml"):
        return 0
    if name.endswith(YAML):
        return 1
    return 2 if name == "classes.txt" else 3


def _checked_names(names: Mapping[object, object], path: str) -> dict[int, str]:
    checked: dict[int, str] = {}
    for key, name in names.items():
        if not isinstance(key, int) or not 0 <= key < MAX_CLASSES:
            raise AnnotationError(
                "class names need numbers from 0", where=path, found=str(list(names)[:5])
            )
        checked[key] = str(name).strip()

    # A lone surrogate, from an escape such as \ud83d, cannot be written as UTF-8.
    if any("\ud800" <= sign <= "\udfff" for name in checked.values() for sign in name):
        raise AnnotationError(
            "a class name holds half a character",
            where=path,
            found=ascii(list(checked.values()))[:120],
        )
    # Two classes of one name would be merged into one without anyone noticing.
    if not checked or not all(checked.values()) or len(set(checked.values())) != len(checked):
        raise AnnotationError(
            "class names must be distinct and not empty",
            where=path,
            found=str(list(checked.values())[:8]),
        )
    return checked


def _class_name(number: int, names: Mapping[int, str] | None) -> str:
    return f"class_{number}" if names is None else names.get(number, f"class number {number}")


def _names_of_lines(data: bytes, path: str) -> Mapping[object, object] | None:
    try:
        lines = data.decode("utf-8-sig").strip().splitlines()
    except UnicodeDecodeError as error:
        raise AnnotationError(
            "a list of class names is not text", where=path, found=str(error)
        ) from None
    return dict(enumerate(lines)) or None


def _names_of_yaml(data: bytes, path: str) -> Mapping[object, object] | None:
    import yaml

    try:
        _refuse_costly_yaml(data, path)
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


def _refuse_costly_yaml(data: bytes, path: str) -> None:
    """Raise AnnotationError for YAML that is small on disk and costly in memory."""
    import yaml

    # Of the events only: once composed, aliases can make a few lines grow without bound, and deep
    # nesting takes quadratic time.
    depth = 0
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_YAML_DEPTH:
            raise AnnotationError("YAML with aliases or deep nesting is refused", where=path)


register(YoloFormat())
