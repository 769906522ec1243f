"""A plain folder of pictures: no boxes, no classes, nothing that could be missing."""

from __future__ import annotations

from ingest.records.base import Parsed, RawPicture
from ingest.sources import SourceListing

__all__ = ["parse_folder"]


def parse_folder(listing: SourceListing) -> Parsed:
    """Every picture of a listing, without boxes."""
    return Parsed(tuple(RawPicture(source, None) for source in listing.pictures), class_names=())
