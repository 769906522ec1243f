"""Class folders: a picture's class is the name of the folder it lies in; there are no boxes.

Split folders around the class folders (`train/cat/1.jpg`) are kept, as for every format. Names are
sorted, numbers as numbers, so that `10` follows `9`. A picture outside any class folder is refused,
because it would have no label.
"""

from __future__ import annotations

from ingest.records.base import Parsed, RawPicture, Rejection
from ingest.records.registry import AnnotationFormat, register
from ingest.sources.listing import SourceListing
from ingest.sources.splits import given_split

__all__ = ["ClassFoldersFormat"]


class ClassFoldersFormat(AnnotationFormat):
    """A folder per class. Not recognised by itself: any folder of folders would look like it."""

    name = "classes"
    is_recognised = False
    needs_annotations = False
    has_boxes = False
    has_picture_classes = True

    def parse(self, listing: SourceListing) -> Parsed:
        """Return every picture of a listing with its class."""
        pictures: list[RawPicture] = []
        rejected: list[Rejection] = []
        names: set[str] = set()
        for source in listing.pictures:
            folder = source.rpartition("/")[0]
            name = folder.rpartition("/")[2]
            # A split folder names no class: `train/1.jpg` would be of the class "train".
            if not name or given_split(f"{name}/") is not None:
                detail = "lies in no folder that names its class"
                rejected.append(Rejection(source, "picture", "no_class_folder", detail))
            else:
                pictures.append(RawPicture(source, class_name=name))
                names.add(name)
        ordered = tuple(sorted(names, key=_numbers_first))
        return Parsed(tuple(pictures), tuple(rejected), ordered)


def _numbers_first(name: str) -> tuple[bool, int, str]:
    # isdigit alone accepts digits such as "²", which int refuses.
    is_number = name.isascii() and name.isdigit()
    return not is_number, int(name) if is_number else 0, name


register(ClassFoldersFormat())
