"""Batches for inference, from the images of a warehouse or from decoded files.

Files are decoded by `ingest`, which this package does not import: the command passes decoded
batches in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.inference.overlay import DetectedImage
from detector.settings import InferSettings
from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from warehouse.format import manifest as tables
from warehouse.read.version import Warehouse

__all__ = ["count_boxes", "decoded_batches", "is_warehouse", "warehouse_batches"]

log = get_log(__name__)
Batch = tuple[dict[str, Tensor], list[str], list[NDArray[np.uint8]] | None]
"""Arrays by name, the names of the images, and the images to draw on where they are at hand."""


class DecodedBatch(Protocol):
    """Images that were decoded and letterboxed together; see `ingest.pictures.show`."""

    @property
    def names(self) -> list[str]: ...
    @property
    def pictures(self) -> list[NDArray[np.uint8]]: ...
    @property
    def canvases(self) -> list[NDArray[np.uint8]]: ...
    @property
    def letterboxes(self) -> list[NDArray[np.float32]]: ...


def is_warehouse(source: Path) -> bool:
    """Return whether a path is a warehouse, a version or a manifest.

    Anything else is an image or a folder of images.
    """
    if source.name == tables.MANIFEST:
        return True
    return any((source / name).is_file() for name in (tables.CURRENT, tables.MANIFEST))


def warehouse_batches(
    source: Path, settings: InferSettings, loader: LoaderSettings
) -> Iterator[Batch]:
    """Yield the first images of a split in stored order, with the names of their source files.

    Parameters
    ----------
    source
        A warehouse, one of its versions, or a manifest.
    settings
        Names the split, the number of images and the size of a batch.
    loader
        Settings of the loader that reads them.
    """
    warehouse = Warehouse.open(source)
    split = warehouse.split(settings.split)
    rows = warehouse.table(tables.SAMPLES, ["split", "index", "source"]).to_pylist()
    names = {row["index"]: row["source"] for row in rows if row["split"] == split.name}
    left = settings.limit
    if len(split) > left:
        log.warning(
            "showing the first %d of %d pictures; --infer.limit shows more", left, len(split)
        )
    # A loader refuses batches larger than every chunk of its split.
    batch_size = min(settings.batch_size, max(split.chunk_sizes))
    with ChunkLoader(split, batch_size, shuffle=False, **loader.model_dump()) as batches:
        for full in batches:
            batch = {key: value[:left] for key, value in full.items()}
            yield batch, [names[int(at)] for at in batch["index"]], None
            left -= len(batch["index"])
            if left <= 0:
                return


def decoded_batches(batches: Iterable[DecodedBatch]) -> Iterator[Batch]:
    """Yield decoded images as the arrays that a detector takes."""
    for batch in batches:
        arrays = {
            "image": torch.from_numpy(np.stack(batch.canvases)),
            "letterbox": torch.from_numpy(np.stack(batch.letterboxes)),
        }
        yield arrays, batch.names, batch.pictures


def count_boxes(detected: Sequence[DetectedImage], threshold: float) -> int:
    """Return the number of boxes that score at least `threshold`; log a warning if it is 0."""
    count = sum(int((image.score >= threshold).sum()) for image in detected)
    if not count:
        # A page without boxes looks like a failure. The best score tells an untrained model from a
        # threshold that is too high.
        best = max(
            (float(image.score.max()) for image in detected if len(image.score)), default=0.0
        )
        log.warning(
            "no box scores %g or more; the best score is %.3f: lower --infer.threshold, or train"
            " longer",
            threshold,
            best,
        )
    return count
