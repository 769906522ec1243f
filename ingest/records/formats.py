# ruff: noqa: F401 - files are imported for the formats that they register
"""The annotation formats that the product knows, and how a folder's format is found out.

To add a format, write a subclass of `AnnotationFormat` in a file of this folder, register it at the
end of that file, and import the file here.
"""

from __future__ import annotations

import difflib
import logging

# Each of these files registers its format. This is the only place that lists them.
import ingest.records.classes
import ingest.records.coco
import ingest.records.folder
import ingest.records.masks
import ingest.records.voc
import ingest.records.yolo
from ingest.records.registry import REGISTERED, AnnotationFormat, InputFolder
from warehouse.errors import ConfigError, SourceError

__all__ = ["AUTO", "RASTER", "format_names", "get_format", "recognise_format"]

log = logging.getLogger(__name__)
AUTO = "auto"
"""The value of `build.format` that has the format recognised."""
RASTER = "raster"
"""The value of `build.format` that builds a cube: no annotation format."""
FALLBACK = "folder"


def format_names() -> tuple[str, ...]:
    """Return all values of `build.format`: `auto`, the annotation formats, and `raster`."""
    return (AUTO, *sorted(REGISTERED), RASTER)


def get_format(name: str) -> AnnotationFormat:
    """Return the annotation format of a name.

    Raises
    ------
    ConfigError
        If there is none; the message lists all names and the nearest one.
    """
    if name in REGISTERED:
        return REGISTERED[name]
    near = difflib.get_close_matches(name, format_names(), n=1, cutoff=0.5)
    raise ConfigError(
        "setting 'build.format' is wrong",
        expected=f"one of {', '.join(format_names())}",
        found=repr(name),
        remedy=f"did you mean {near[0]!r}?" if near else None,
    )


def recognise_format(folder: InputFolder) -> tuple[AnnotationFormat, tuple[str, ...], str | None]:
    """Find out which annotation format a folder has.

    Returns
    -------
    tuple
        The format, its annotation files, and a warning or None.

    Raises
    ------
    SourceError
        If there are annotations of more than one format.
    """
    found = {}
    for name in sorted(REGISTERED):
        if REGISTERED[name].is_recognised:
            files = REGISTERED[name].find_annotations(folder)
            if files:
                found[name] = files

    matching = [name for name, files in found.items() if REGISTERED[name].matches(folder, files)]
    # Annotations of other pictures still tell the format, and each of them is reported later.
    candidates = matching or list(found)
    if len(candidates) > 1:
        raise SourceError(
            "annotations of more than one format",
            where=folder.root,
            found=" and ".join(candidates),
            remedy=f"choose one with --build.format {candidates[0]}",
        )
    # Images without boxes are legitimate, for an encoder for example, but annotations may also have
    # been overlooked: so the folder is built with a warning.
    if not candidates:
        warning = (
            "no annotations recognised: taken as a plain folder of pictures without boxes"
            " (--build.format folder)"
        )
        log.warning(warning)
        return REGISTERED[FALLBACK], (), warning

    chosen = REGISTERED[candidates[0]]
    files = found[chosen.name]
    log.info("format: %s, for %d of %s", chosen.name, len(files), chosen.expected_files)
    return chosen, files, None
