"""Class folders: a picture's class is the name of the folder it lies in; there are no boxes.

Given split folders around the class folders (`train/cat/1.jpg`) are kept, as for every format.
Names are sorted, numbers as numbers, so that `10` follows `9`. A picture outside any class folder
is refused: it would have no label.
"""

from __future__ import annotations

from ingest.records.base import Parsed, RawPicture, Rejection
from ingest.sources import SourceListing
from ingest.splits import given_split

__all__ = ["parse_classes"]


def parse_classes(listing: SourceListing) -> Parsed:
    """Every picture of a listing with its class."""
    pictures, rejected = [], []
    for source in listing.pictures:
        folder = source.rpartition("/")[0]
        name = folder.rpartition("/")[2]
        if not name or given_split(f"{name}/") is not None:
            rejected.append(
                Rejection(
                    source, "picture", "no_class_folder", "lies in no folder that names its class"
                )
            )
        else:
            pictures.append(RawPicture(source, None, class_name=name))
    names = sorted({raw.class_name for raw in pictures if raw.class_name is not None}, key=_order)
    return Parsed(tuple(pictures), tuple(rejected), tuple(names))


def _order(name: str) -> tuple[bool, int, str]:
    number = name.isascii() and name.isdigit()
    return not number, int(name) if number else 0, name
