"""A small labelled data set from nothing but a seed: boxes, classes, masks, or a landscape.

A folder is only written where it is empty or holds an earlier sample, which a marker file shows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ingest.synthetic.box_annotations import write_scenes
from ingest.synthetic.labels import write_classes, write_masks
from ingest.synthetic.landscape import write_landscape
from ingest.synthetic.scenes import CLASSES, draw_masked, draw_one
from ingest.synthetic.settings import SampleSettings
from warehouse.errors import SourceError

__all__ = ["make_sample"]

MARKER = "sample.json"
OWN_FOLDERS = (
    "JPEGImages",
    "Annotations",
    "images",
    "labels",
    "annotations",
    "scenes",
    "masks",
    *CLASSES,
)
OWN_FILES = ("data.yaml", "raster.yaml", "terrain.tif", "cover.tif", "height.tif", MARKER)


def make_sample(
    settings: SampleSettings, *, progress: Callable[[int], None] | None = None
) -> dict[str, object]:
    """Write a sample into `settings.output`.

    Parameters
    ----------
    progress
        Called with numbers of pictures, or dates of a cube, that are done.

    Returns
    -------
    dict
        `path`, and `count`: the number of pictures, or of dates of a cube.

    Raises
    ------
    SourceError
        If the output is a file, holds something else, or cannot be written.
    """
    output = Path(settings.output)
    _make_room(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # The marker comes first: a sample that was interrupted may be made again.
        _write_marker(output, settings)
        _write(output, settings, progress)
    except OSError as error:
        raise SourceError(
            "the sample cannot be written",
            where=output,
            found=error.strerror,
            remedy="choose another --sample.output",
        ) from None
    return {"path": str(output), "count": settings.count}


def _write_marker(output: Path, settings: SampleSettings) -> None:
    used = settings.model_dump(mode="json", exclude={"output"})
    text = json.dumps({"made_by": "make_sample", "settings": used}, indent=1)
    (output / MARKER).write_text(text)


def _write(output: Path, settings: SampleSettings, progress: Callable[[int], None] | None) -> None:
    count, size, seed = settings.count, settings.size, settings.seed
    if settings.kind == "cube":
        write_landscape(output, count, size, seed, progress)
    elif settings.kind == "classes":
        write_classes(output, count, partial(draw_one, seed, size=size), CLASSES, progress)
    elif settings.kind == "masks":
        write_masks(output, count, partial(draw_masked, seed, size=size), progress)
    else:
        write_scenes(output, settings, progress)


def _make_room(output: Path) -> None:
    """Remove an earlier sample, and refuse a folder that holds anything else."""
    remedy = "choose another --sample.output, or empty the folder yourself"
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise SourceError("the sample's output is not a folder", where=output, remedy=remedy)
    if not output.exists():
        return
    names = {entry.name for entry in output.iterdir()}
    if names and MARKER not in names:
        raise SourceError(
            "the output folder is not empty and holds no earlier sample",
            where=output,
            remedy=remedy,
        )
    foreign = sorted(names - {*OWN_FOLDERS, *OWN_FILES})
    if foreign:
        raise SourceError(
            "the output folder holds more than an earlier sample",
            where=output,
            found=foreign[0],
            remedy=remedy,
        )
    try:
        for name in OWN_FOLDERS:
            if name in names:
                shutil.rmtree(output / name)
        for name in OWN_FILES:
            if name != MARKER:
                (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(
            "the earlier sample cannot be removed",
            where=output,
            found=str(error)[:120],
            remedy=remedy,
        ) from None
