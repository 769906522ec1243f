"""Pascal VOC: an XML file a picture, boxes in pixels.

Coordinates are taken as given: VOC's own tool counted pixels from 1, most others from 0, and
nothing in the file tells which; shifting would be wrong by as much as not shifting. `<filename>`
and `<path>` are never used. `difficult` and `truncated` become flags. An XML file that does not
parse makes its picture invalid, with file and line; the others are read.
"""

from __future__ import annotations

import math
from typing import Any

from ingest.pairing import pair_by_stem
from ingest.records.base import Parsed, RawBox, RawPicture, Rejection
from ingest.sources import SourceListing, read_inside
from warehouse.errors import AnnotationError
from warehouse.format.schema import DIFFICULT, TRUNCATED

__all__ = ["parse_voc", "read_voc_xml"]

MAX_XML_BYTES = 16 << 20
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def parse_voc(listing: SourceListing) -> Parsed:
    """Every picture of a listing with the boxes of its XML file.

    Nothing is raised for a single bad file: it is in `rejected`.
    """
    pairs = pair_by_stem(listing.pictures, listing.annotations)
    pictures: list[RawPicture] = []
    rejected = [
        Rejection(path, "annotation", "missing_picture", "no picture of this stem")
        for path in pairs.orphans
    ]
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
            pictures.append(RawPicture(source, None))
        else:
            try:
                data = read_inside(
                    listing.root, path, limit=MAX_XML_BYTES, sha256=listing.sha256_of(path)
                )
                boxes, size = read_voc_xml(data, path)
            except AnnotationError as error:
                rejected.append(Rejection(source, "picture", "bad_annotation", str(error)))
            else:
                pictures.append(RawPicture(source, None, boxes, size, path))
    return Parsed(tuple(pictures), tuple(rejected))


def read_voc_xml(data: bytes, path: str) -> tuple[tuple[RawBox, ...], tuple[int, int] | None]:
    """(boxes, (width, height) as declared or None). Raises AnnotationError with file and line."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root = fromstring(data, forbid_dtd=True)
    except ParseError as error:
        raise AnnotationError(
            "XML does not parse",
            where=f"{path}, line {error.position[0]}",
            found=str(error).split(":")[0],
        ) from None
    except DefusedXmlException as error:
        raise AnnotationError(
            "XML with a DTD, entities or external references is refused",
            where=path,
            found=type(error).__name__,
        ) from None
    except (ValueError, LookupError, RecursionError) as error:
        raise AnnotationError("XML does not parse", where=path, found=str(error)) from None
    if root.tag != "annotation":
        raise AnnotationError(
            "not a Pascal VOC annotation",
            where=path,
            expected="<annotation>",
            found=f"<{root.tag}>",
        )
    boxes = tuple(
        _box(item, f"{path}, object {at}") for at, item in enumerate(root.findall("object"), 1)
    )
    return boxes, _size(root)


def _box(item: Any, where: str) -> RawBox:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise AnnotationError("an object has no class name", where=where)
    box = item.find("bndbox")
    if box is None:
        raise AnnotationError("an object has no <bndbox>", where=where)
    values = []
    for corner in CORNERS:
        text = box.findtext(corner)
        try:
            values.append(float(text))
        except (TypeError, ValueError):
            raise AnnotationError(
                f"<{corner}> is not a number", where=where, found=repr(text)
            ) from None
    flags = DIFFICULT * _is_set(item, "difficult") | TRUNCATED * _is_set(item, "truncated")
    return RawBox((values[0], values[1], values[2], values[3]), name, flags)


def _is_set(item: Any, key: str) -> bool:
    return (item.findtext(key) or "0").strip().lower() not in (
        "0",
        "",
        "false",
        "no",
        "unspecified",
    )


def _size(root: Any) -> tuple[int, int] | None:
    try:
        width, height = (float(root.findtext(f"size/{side}")) for side in ("width", "height"))
    except (TypeError, ValueError):
        return None
    if not (math.isfinite(width) and math.isfinite(height)) or width < 1 or height < 1:
        return None
    return int(width), int(height)
