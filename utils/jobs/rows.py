"""Samples of a split by number, in arrays of their own.

Purpose: micro-jobs, exports and pictures of a batch read the rows that they need, in any order.
Used by: features.jobs, features.pictures, segmentation.mask_jobs, segmentation.mask_results
Design notes: a plain gather through a ChunkReader; the training path does not come here.
Assistant guidance: when extending: a new way to read belongs to the readers, not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.read.version import ChunkReader

__all__ = ["read_rows"]


def read_rows(
    reader: ChunkReader, names: list[str], indices: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Samples `indices` of a split, in fresh arrays [len(indices), ...]."""
    specs = reader.split.specs
    out: dict[str, NDArray[Any]] = {
        name: np.empty((len(indices), *specs[name].shape[1:]), specs[name].dtype) for name in names
    }
    reader.fill(names, indices, out)
    return out
