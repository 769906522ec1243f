"""A plain folder of pictures: no boxes, no classes, nothing that could be missing."""

from __future__ import annotations

from ingest.records.base import Parsed, RawPicture
from ingest.records.registry import AnnotationFormat, register
from ingest.sources.listing import SourceListing

__all__ = ["FolderFormat"]


class FolderFormat(AnnotationFormat):
    """Pictures without annotations; `auto` falls back on it where it recognises nothing."""

    name = "folder"
    is_recognised = False
    needs_annotations = False
    has_boxes = False

    def parse(self, listing: SourceListing) -> Parsed:
        """Return every picture of a listing, without boxes."""
        return Parsed(tuple(RawPicture(source) for source in listing.pictures), class_names=())


register(FolderFormat())
