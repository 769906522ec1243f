"""Formats with one annotation file for each picture, of the same name but for the extension."""

from __future__ import annotations

from collections.abc import Callable

from ingest.records.base import RawPicture, Rejection
from ingest.sources.files import read_inside
from ingest.sources.listing import SourceListing
from ingest.sources.pairing import pair_by_stem
from warehouse.errors import AnnotationError

__all__ = ["parse_paired_files"]


def parse_paired_files(
    listing: SourceListing,
    parse_file: Callable[[str, str, bytes], RawPicture],
    *,
    limit: int,
    normalised: bool = False,
) -> tuple[tuple[RawPicture, ...], tuple[Rejection, ...]]:
    """Read the annotation file of every picture.

    Parameters
    ----------
    parse_file
        Called with the picture's path, the annotation's path and the annotation's content. An
        AnnotationError that it raises makes the picture invalid; the other files are still read.
    limit
        The largest size of an annotation file in bytes.
    normalised
        Whether coordinates are fractions of the picture, for pictures without a file.

    Returns
    -------
    tuple
        The pictures, and what was rejected: pictures whose file is faulty or belongs to another
        picture, and files without a picture.
    """
    pairs = pair_by_stem(listing.pictures, listing.annotations)
    pictures: list[RawPicture] = []
    rejected = [
        Rejection(path, "annotation", "missing_picture", "no picture of this stem")
        for path in pairs.orphans
    ]
    for source in listing.pictures:
        if source in pairs.ambiguous:
            detail = f"{pairs.ambiguous[source]} belongs to another picture of this stem"
            rejected.append(Rejection(source, "picture", "ambiguous_annotation", detail))
            continue

        # Whether a picture without a file is a fault depends on settings, so it is kept here.
        path = pairs.annotation_of.get(source)
        if path is None:
            pictures.append(RawPicture(source, normalised=normalised))
            continue
        data = read_inside(listing.root, path, limit=limit, sha256=listing.sha256_of(path))
        # One faulty file must not stop a build of thousands: `max_invalid` decides about them all.
        try:
            pictures.append(parse_file(source, path, data))
        except AnnotationError as error:
            rejected.append(Rejection(source, "picture", "bad_annotation", str(error)))
    return tuple(pictures), tuple(rejected)
