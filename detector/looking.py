"""Applying a detector to the pictures of a warehouse or of files, batch by batch.

Decoding files is the business of `ingest`, which this package does not import: the command passes
decoded batches in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.settings import InferSettings
from detector.view import Shown
from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from warehouse.format import manifest as tables
from warehouse.read.version import Warehouse

__all__ = ["count_boxes", "decoded_batches", "is_warehouse", "warehouse_batches"]

log = get_log(__name__)
Batch = tuple[dict[str, Tensor], list[str], list[NDArray[np.uint8]] | None]
"""Arrays by name, the names of the pictures, and the pictures to draw on where they are at hand."""


class DecodedBatch(Protocol):
    """Pictures that were decoded and letterboxed together; see `ingest.pictures.show`."""

    @property
    def names(self) -> list[str]: ...
    @property
    def pictures(self) -> list[NDArray[np.uint8]]: ...
    @property
    def canvases(self) -> list[NDArray[np.uint8]]: ...
    @property
    def letterboxes(self) -> list[NDArray[np.float32]]: ...


def is_warehouse(source: Path) -> bool:
    """Whether a path is a warehouse, a version or a manifest, not a picture or a folder of them."""
    if source.name == tables.MANIFEST:
        return True
    return any((source / name).is_file() for name in (tables.CURRENT, tables.MANIFEST))


def warehouse_batches(
    source: Path, settings: InferSettings, loader: LoaderSettings
) -> Iterator[Batch]:
    """The first pictures of a split in stored order, with the names of their source files."""
    warehouse = Warehouse.open(source)
    split = warehouse.split(settings.split)
    rows = warehouse.table(tables.SAMPLES, ["split", "index", "source"]).to_pylist()
    names = {row["index"]: row["source"] for row in rows if row["split"] == split.name}
    left = settings.limit
    if len(split) > left:
        log.warning(
            "showing the first %d of %d pictures; --infer.limit shows more", left, len(split)
        )
    batch_size = min(settings.batch_size, max(split.chunk_sizes))
    with ChunkLoader(split, batch_size, shuffle=False, **loader.model_dump()) as batches:
        for whole in batches:
            batch = {key: value[:left] for key, value in whole.items()}
            yield batch, [names[int(at)] for at in batch["index"]], None
            left -= len(batch["index"])
            if left <= 0:
                return


def decoded_batches(batches: Iterable[DecodedBatch]) -> Iterator[Batch]:
    """Decoded pictures as the arrays that a detector takes."""
    for batch in batches:
        arrays = {
            "image": torch.from_numpy(np.stack(batch.canvases)),
            "letterbox": torch.from_numpy(np.stack(batch.letterboxes)),
        }
        yield arrays, batch.names, batch.pictures


def count_boxes(shown: Sequence[Shown], threshold: float) -> int:
    """Boxes that score at least the threshold; warns where there are none."""
    count = sum(int((one.score >= threshold).sum()) for one in shown)
    if not count:
        best = max((float(one.score.max()) for one in shown if len(one.score)), default=0.0)
        log.warning(
            "no box scores %g or more; the best score is %.3f: lower --infer.threshold, or train"
            " longer",
            threshold,
            best,
        )
    return count
