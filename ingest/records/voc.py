"""Pascal VOC: an XML file a picture, boxes in pixels.

Coordinates are taken as they are. VOC's own tool counted pixels from 1 and most others count from
0; nothing in the file tells which, so shifting would be wrong as often as not shifting.
`<filename>` and `<path>` are never used: they are often stale, and would let a file name a path.
`difficult` and `truncated` become flags. An XML file that does not parse makes its picture invalid,
with file and line; the others are read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ingest.records.base import Parsed, RawBox, RawPicture
from ingest.records.paired_files import parse_paired_files
from ingest.records.registry import AnnotationFormat, InputFolder, files_by_stem, register
from ingest.sources.listing import SourceListing
from warehouse.errors import AnnotationError
from warehouse.format.schema import DIFFICULT, TRUNCATED

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["VocFormat", "read_voc_xml"]

MAX_XML_BYTES = 16 << 20
CORNERS = ("xmin", "ymin", "xmax", "ymax")
UNSET = ("0", "", "false", "no", "unspecified")


class VocFormat(AnnotationFormat):
    """Pascal VOC, as described in its development kit."""

    name = "voc"
    expected_files = "*.xml beside the pictures or in Annotations/"

    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        """Return XML files beside the images or in a folder of annotations."""
        return files_by_stem(folder, ".xml")

    def parse(self, listing: SourceListing) -> Parsed:
        """Read the XML file of every picture."""
        return Parsed(*parse_paired_files(listing, _read_picture, limit=MAX_XML_BYTES))


def _read_picture(source: str, path: str, data: bytes) -> RawPicture:
    boxes, size = read_voc_xml(data, path)
    return RawPicture(source, boxes, size, path)


def read_voc_xml(data: bytes, path: str) -> tuple[tuple[RawBox, ...], tuple[int, int] | None]:
    """Read one annotation.

    Parameters
    ----------
    path
        The file's path, for messages.

    Returns
    -------
    tuple
        The boxes, and width and height as declared, or None.

    Raises
    ------
    AnnotationError
        Naming the file and the line or object, for anything that is not VOC's XML.
    """
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    # Annotations come from the internet: with a DTD a small file can expand to gigabytes or read
    # other files of the machine.
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
    # LookupError for an encoding in the declaration that Python does not know.
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


def _box(item: Element, where: str) -> RawBox:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise AnnotationError("an object has no class name", where=where)
    box = item.find("bndbox")
    if box is None:
        raise AnnotationError("an object has no <bndbox>", where=where)
    values = []
    # By name, because tools write the four in different orders.
    for corner in CORNERS:
        text = box.findtext(corner)
        try:
            values.append(float(text or ""))
        except ValueError:
            raise AnnotationError(
                f"<{corner}> is not a number", where=where, found=repr(text)
            ) from None
    flags = DIFFICULT * _is_set(item, "difficult") | TRUNCATED * _is_set(item, "truncated")
    return RawBox((values[0], values[1], values[2], values[3]), name, flags)


def _is_set(item: Element, key: str) -> bool:
    return (item.findtext(key) or "0").strip().lower() not in UNSET


def _size(root: Element) -> tuple[int, int] | None:
    # The declared size is only compared with the image, so a missing or odd one is no fault.
    try:
        width = float(root.findtext("size/width") or "")
        height = float(root.findtext("size/height") or "")
    except ValueError:
        return None
    if not (math.isfinite(width) and math.isfinite(height)) or width < 1 or height < 1:
        return None
    return int(width), int(height)


register(VocFormat())
