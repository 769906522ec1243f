"""Pictures with masks: an image file a picture whose values say which class each pixel has.

There are no boxes. A mask is found by name (`ingest.sources.pairing.pairing_key`):
`images/a.png` and `masks/a.png`, `a.jpg` and `a_mask.png`, and the like. `build.mask_values`
declares which value means which class; `ingest.pictures.mask_decoding` decodes the files.
"""

from __future__ import annotations

from ingest.records.base import Parsed, RawPicture, Rejection
from ingest.records.registry import AnnotationFormat, InputFolder, register
from ingest.sources.files import PICTURE_EXTENSIONS
from ingest.sources.listing import SourceListing
from ingest.sources.pairing import is_mask, pairing_key

__all__ = ["MasksFormat", "parse_masks"]


class MasksFormat(AnnotationFormat):
    """Pictures and mask images. Not recognised by itself: masks look like pictures."""

    name = "masks"
    expected_files = "images in masks/ or label/, or named *_mask beside the pictures"
    is_recognised = False
    has_boxes = False
    has_masks = True

    def is_picture(self, path: str) -> bool:
        """Return whether an image file is a picture by its name, and not a mask."""
        return not is_mask(path)

    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        """Return every image that is not a picture."""
        return tuple(path for path in folder.others if path.lower().endswith(PICTURE_EXTENSIONS))

    def parse(self, listing: SourceListing) -> Parsed:
        """Return every picture of a listing with its mask."""
        return parse_masks(listing)


def parse_masks(listing: SourceListing) -> Parsed:
    """Pair every picture of a listing with its mask.

    Pictures without a mask, and those with two masks of their name, are rejected.
    """
    masks: dict[tuple[str, str], list[str]] = {}
    for path in listing.annotations:
        masks.setdefault(pairing_key(path), []).append(path)

    pictures: list[RawPicture] = []
    rejected: list[Rejection] = []
    used: set[str] = set()
    for source in listing.pictures:
        # A mask that two images share by name belongs to neither for certain: the first has it, the
        # second is reported.
        found = masks.get(pairing_key(source), [])
        if len(found) == 1 and found[0] not in used:
            pictures.append(RawPicture(source, mask=found[0]))
            used.add(found[0])
        elif found:
            detail = f"{found[-1]} is of its name too"
            rejected.append(Rejection(source, "picture", "ambiguous_mask", detail))
        else:
            rejected.append(Rejection(source, "picture", "no_mask", "no mask of this name"))

    rejected += [
        Rejection(path, "annotation", "missing_picture", "no picture of this name")
        for path in listing.annotations
        if path not in used
    ]
    # `build.mask_values` names the classes, not the files.
    return Parsed(tuple(pictures), tuple(rejected), class_names=())


register(MasksFormat())
