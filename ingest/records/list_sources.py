"""From an input root to the listing of a build: pictures, annotations, and the hashes of both.

Only names and bytes are read. No annotation is parsed and no image is opened, so that rebuilding
unchanged data returns quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ingest.records.formats import AUTO, get_format, recognise_format
from ingest.records.registry import AnnotationFormat, InputFolder
from ingest.sources.files import PICTURE_EXTENSIONS, input_root, walk_sources
from ingest.sources.listing import SourceListing, hash_sources
from warehouse.errors import SourceError
from warehouse.settings import BuildSettings

__all__ = ["list_sources"]


def list_sources(
    settings: BuildSettings, *, progress: Callable[[int], None] | None = None
) -> SourceListing:
    """Walk `build.input_root`, find out its format, and hash what belongs to it.

    Parameters
    ----------
    progress
        Called with numbers of files that are done.

    Raises
    ------
    ConfigError
        If there is no such format.
    SourceError
        If there is no usable input root, no image, no annotation of the requested format, or if
        there are two formats at once, a link out of the root, or a file that cannot be read.
    """
    # Before anything is walked: a mistyped format is known at once, a large folder takes a while.
    requested = None if settings.format == AUTO else get_format(settings.format)
    root = input_root(settings)
    found = dict(walk_sources(root, Path(settings.output_root)))
    pictures = _pictures(root, list(found), requested)
    others = tuple(sorted(set(found) - set(pictures)))
    folder = InputFolder(root, pictures, others, is_chosen=requested is not None)

    warnings: tuple[str, ...] = ()
    if requested is None:
        chosen, annotations, warning = recognise_format(folder)
        warnings = () if warning is None else (warning,)
    else:
        chosen, annotations = requested, _annotations_of(requested, folder)

    # A list of class names changes labels, so it belongs to the fingerprint as annotations do.
    naming = {path for path in found if chosen.names_classes(path)} - set(annotations)
    listed = sorted([*pictures, *annotations, *naming])
    files = hash_sources(root, listed, found, rehash=settings.rehash, progress=progress)
    return SourceListing(root, chosen.name, pictures, annotations, files, warnings)


def _pictures(root: Path, paths: list[str], requested: AnnotationFormat | None) -> tuple[str, ...]:
    # Sorted, because the order of a folder differs between file systems.
    images = sorted(path for path in paths if path.lower().endswith(PICTURE_EXTENSIONS))
    pictures = tuple(path for path in images if requested is None or requested.is_picture(path))
    if not pictures:
        raise SourceError(
            "no pictures found",
            where=root,
            expected=f"files ending in {' '.join(PICTURE_EXTENSIONS)}",
            found=f"{len(paths)} other files",
            remedy="point --build.input_root at the folder that holds the pictures",
        )
    return pictures


def _annotations_of(requested: AnnotationFormat, folder: InputFolder) -> tuple[str, ...]:
    annotations = requested.find_annotations(folder)
    if requested.needs_annotations and not annotations:
        raise SourceError(
            f"no {requested.name} annotations found",
            where=folder.root,
            expected=requested.expected_files,
            remedy=(
                "check --build.input_root, or choose another --build.format (folder has no boxes)"
            ),
        )
    return annotations
