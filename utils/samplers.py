"""Epoch orders as index arithmetic: which samples make batch g of an epoch, for any rank.

Purpose: `ChunkBatchSampler` keeps a batch inside one stored chunk; `RandomBatchSampler` ignores
  chunks, as a control.
Used by: benchmarks.data, benchmarks.scale, benchmarks.shuffle, utils.loader, vqvae.block_sampling,
  vqvae.training
Design notes: the arithmetic is in utils.loading.orders; ranks, epochs and state are in
  utils.loading.batch_sampler. What a user imports is here.
Assistant guidance: when extending: no torch, no I/O, no global generator. A sampler of your own
  subclasses `BatchSampler` and makes an `Order` for each epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.loading.batch_sampler import BatchSampler
from utils.loading.orders import BatchPlan, ChunkOrder, RandomOrder, mix64, permutation
from warehouse.errors import ConfigError

__all__ = [
    "BatchPlan",
    "BatchSampler",
    "ChunkBatchSampler",
    "RandomBatchSampler",
    "mix64",
    "permutation",
]


class ChunkBatchSampler(BatchSampler):
    """Batches that each lie in one stored chunk, every sample once an epoch.

    The chunks are permuted and dealt to `interleave` lanes. Within a chunk (or `chunks_per_batch`
    of them) the samples are permuted and cut into batches, and the lanes give batches in turn. The
    tail that does not fill all ranks is filled up with repeats that `batches()` marks `pad`, unless
    `drop_last`. If world_size divides interleave, ranks read disjoint chunks. See `BatchSampler`
    for the parameters.

    Warns when no chunk holds a whole batch.

    Examples
    --------
    >>> list(ChunkBatchSampler([3, 2], 2, shuffle=False))
    [[0, 1], [2], [3, 4]]
    """

    def __init__(self, chunk_sizes: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(chunk_sizes, batch_size, **options)
        largest = int(self.sizes.max()) * self.chunks_per_batch if self.sizes.size else 0
        if self.sizes.size and self.batch_size > largest:
            warnings.warn(
                f"batch_size {self.batch_size} is above the {largest} samples of a stored chunk: "
                "every batch will be short; lower it, raise chunks_per_batch, or build with a "
                "larger build.shard_samples",
                stacklevel=2,
            )

    def _make_order(self, epoch: int) -> ChunkOrder:
        return ChunkOrder(self.sizes, self, epoch)


class RandomBatchSampler(BatchSampler):
    """Batches drawn from the whole split, ignoring chunks: a full shuffle, as a control.

    A batch of B touches up to B stored chunks, so that as many files are mapped and paged in for
    it; on a cold disk or a network store every sample is a seek. Memory: 8 bytes a sample. See
    `BatchSampler` for the parameters; `interleave` and `chunks_per_batch` are refused.
    """

    by_chunk = False

    def __init__(self, chunk_sizes: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(chunk_sizes, batch_size, **options)
        if self.interleave != 1 or self.chunks_per_batch != 1:
            raise ConfigError(
                "RandomBatchSampler ignores chunks: interleave and chunks_per_batch mean nothing",
                found=f"{self.interleave}, {self.chunks_per_batch}",
                remedy="leave them out or use ChunkBatchSampler",
            )

    @property
    def chunks_touched(self) -> float:
        """The expected number of stored chunks that one batch reads from."""
        share = self.sizes / max(1, self.sizes.sum())
        return float(np.sum(-np.expm1(self.batch_size * np.log1p(-np.minimum(share, 1 - 1e-12)))))

    def _make_order(self, epoch: int) -> RandomOrder:
        return RandomOrder(int(self.sizes.sum()), self, epoch)
