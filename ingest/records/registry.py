"""What an annotation format declares, and the table in which formats are registered.

A format is a subclass of `AnnotationFormat` in a file of this folder that ends with a call of
`register`. Everything that depends on the format asks the object: which files are its annotations,
whether a picture without boxes is a fault, which arrays a version gets. Nothing compares names.
"""

from __future__ import annotations

import posixpath
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ingest.records.base import Parsed
from ingest.sources.listing import SourceListing
from ingest.sources.pairing import in_annotation_folder, pair_by_stem

__all__ = ["REGISTERED", "AnnotationFormat", "InputFolder", "files_by_stem", "register"]

# Text files that data sets come with. One with the name of a picture is its annotation anyway.
NOT_LABELS = re.compile(
    r"^(?:classes|train|val|valid|test|trainval|readme.*|license.*|requirements|notes)\.txt$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class InputFolder:
    """What a format may look at to find its annotations.

    Attributes
    ----------
    root
        The input root.
    pictures
        All pictures, as sorted POSIX paths relative to the root.
    others
        All other files, likewise.
    is_chosen
        Whether the user named the format; False while formats are being recognised.
    """

    root: Path
    pictures: tuple[str, ...]
    others: tuple[str, ...]
    is_chosen: bool


class AnnotationFormat(ABC):
    """One value of `build.format`: how its files are found and how they are read.

    Attributes
    ----------
    name
        The value of `build.format`, which is also part of a version's recipe.
    expected_files
        Which files the format expects and where, for messages.
    is_recognised
        Whether `build.format: auto` may choose the format.
    needs_annotations
        Whether an input folder without any annotation file is refused.
    has_boxes
        Whether pictures have boxes, so that an annotation can be missing and a picture empty.
    has_picture_classes
        Whether each picture as a whole has a class, which is stored in the array `target`.
    has_masks
        Whether each picture has a mask, which is stored in the array `mask`.

    Examples
    --------
    `tests/ingest/test_formats.py` adds a format and builds a version with it.
    """

    name: ClassVar[str]
    expected_files: ClassVar[str] = ""
    is_recognised: ClassVar[bool] = True
    needs_annotations: ClassVar[bool] = True
    has_boxes: ClassVar[bool] = True
    has_picture_classes: ClassVar[bool] = False
    has_masks: ClassVar[bool] = False

    def is_picture(self, path: str) -> bool:
        """Return whether an image file is a picture, rather than a mask."""
        return True

    # The defaults suit a format without annotation files, so that only `parse` has to be written.
    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        """Return the annotation files among `folder.others`, sorted."""
        return ()

    def matches(self, folder: InputFolder, annotations: tuple[str, ...]) -> bool:
        """Return whether files that `find_annotations` found are really of this format.

        Called only when formats are being recognised. A text file in `labels/` that belongs to no
        picture, such as a README, does not make a data set YOLO.
        """
        return bool(pair_by_stem(folder.pictures, annotations).annotation_of)

    def names_classes(self, path: str) -> bool:
        """Return whether a file is read for names of classes, so that the fingerprint covers it."""
        return False

    @abstractmethod
    def parse(self, listing: SourceListing) -> Parsed:
        """Read every annotation of a listing, without judging boxes.

        Raises
        ------
        AnnotationError
            For a file without which the rest makes no sense. A fault of a single picture is
            returned in `Parsed.rejected` instead.
        """


REGISTERED: dict[str, AnnotationFormat] = {}
"""All registered formats by name. `ingest.records.formats` fills it with those of this folder."""


def register(annotation_format: AnnotationFormat) -> None:
    """Make a format available as a value of `build.format`."""
    # A second format of a name would replace the first, and old recipes would mean another reader.
    assert annotation_format.name not in {*REGISTERED, "auto", "raster"}
    REGISTERED[annotation_format.name] = annotation_format


def files_by_stem(folder: InputFolder, extension: str) -> tuple[str, ...]:
    """Return files of an extension that lie beside images or in a folder such as `labels`.

    Parameters
    ----------
    extension
        The extension in lower case, with its dot.
    """
    # Elsewhere a file of the extension is about something else, such as a tool's settings.xml.
    beside = {posixpath.dirname(path) for path in folder.pictures}
    stems = {posixpath.splitext(posixpath.basename(path))[0] for path in folder.pictures}
    chosen = []
    for path in folder.others:
        parent, name = posixpath.split(path)
        if not name.lower().endswith(extension):
            continue
        if NOT_LABELS.match(name) and posixpath.splitext(name)[0] not in stems:
            continue
        if parent in beside or in_annotation_folder(path):
            chosen.append(path)
    return tuple(chosen)
