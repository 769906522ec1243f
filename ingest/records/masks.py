"""Pictures with masks: an image file a picture whose values say which class each pixel has; there
are no boxes.

A mask is found by name (`ingest.pairing.mask_place`): `images/a.png` and `masks/a.png`, `a.jpg` and
`a_mask.png`, and the like. `build.mask_values` declares which value means which class: 0/255 files
declared as 0/1 are refused, not guessed. `ingest.pictures.masks` decodes them.
"""

from __future__ import annotations

from ingest.pairing import mask_place
from ingest.records.base import Parsed, RawPicture, Rejection
from ingest.sources import SourceListing

__all__ = ["parse_masks"]


def parse_masks(listing: SourceListing) -> Parsed:
    """Every picture of a listing with its mask.

    Pictures without, or with two masks of their name, are in `rejected`.
    """
    by_place: dict[tuple[str, str], list[str]] = {}
    for path in listing.annotations:
        by_place.setdefault(mask_place(path), []).append(path)
    pictures, rejected, used = [], [], set()
    for source in listing.pictures:
        found = by_place.get(mask_place(source), [])
        if len(found) == 1 and found[0] not in used:
            pictures.append(RawPicture(source, None, mask=found[0]))
            used.add(found[0])
        else:
            what = (
                ("no_mask", "no mask of this name")
                if not found
                else ("ambiguous_mask", f"{found[-1]} is of its name too")
            )
            rejected.append(Rejection(source, "picture", *what))
    orphans = [path for path in listing.annotations if path not in used]
    rejected += [
        Rejection(path, "annotation", "missing_picture", "no picture of this name")
        for path in orphans
    ]
    return Parsed(tuple(pictures), tuple(rejected), class_names=())
