"""The batches that engines fill, with the counts of what filling them took.

Purpose: `Batch` is what engines deliver; `Filled` is what a thread or worker reports; `Engine` is
  what the loader asks of an engine; `LoaderStats` adds up an epoch.
Used by: utils.loader, utils.loading.engines, utils.loading.local, utils.loading.spawn
Design notes: counters travel with their batch, so that the statistics of an epoch count what was
  delivered and not what was fetched ahead.
Assistant guidance: when extending: what a worker sends back is pickled for every batch; keep it
  small.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from utils.loader_utils import BatchRing
from utils.loading.orders import BatchPlan
from warehouse.errors import WarehouseError
from warehouse.read.chunks import ChunkReader

__all__ = ["Batch", "Engine", "Filled", "LoaderStats"]


@dataclass(slots=True)
class Batch:
    """A filled batch.

    Attributes
    ----------
    plan
        The batch's number and sample indices.
    arrays
        The arrays by name, ``[B, ...]`` each.
    decoded, bytes_read, chunks_opened
        Samples decoded, stored bytes read, and stored chunks opened for it.
    fallback
        1 if it got a fresh buffer because all ring buffers were in use, else 0.
    """

    plan: BatchPlan
    arrays: dict[str, NDArray[Any]]
    decoded: int = 0
    bytes_read: int = 0
    chunks_opened: int = 0
    fallback: int = 0


@dataclass(slots=True)
class Filled:
    """What a thread or worker reports about a batch: counts, or an error as a value.

    `arrays` holds the batch itself if no ring buffer was free for it.
    """

    decoded: int = 0
    bytes_read: int = 0
    chunks_opened: int = 0
    error: WarehouseError | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class LoaderStats:
    """Counts of the current epoch, of the batches delivered so far.

    Attributes
    ----------
    samples
        Samples delivered.
    decoded
        Samples decoded. It equals `samples`: nothing is decoded twice, and nothing in vain.
    bytes_read
        Stored bytes read.
    waited_s
        Seconds that the consumer waited for batches.
    chunks_opened
        Stored chunks opened.
    fallback_buffers
        Batches that got a fresh buffer because all ring buffers were in use.
    """

    samples: int = 0
    decoded: int = 0
    bytes_read: int = 0
    waited_s: float = 0.0
    chunks_opened: int = 0
    fallback_buffers: int = 0

    def add(self, batch: Batch) -> None:
        """Count a batch that is being delivered."""
        self.samples += len(batch.plan.indices)
        self.decoded += batch.decoded
        self.bytes_read += batch.bytes_read
        self.chunks_opened += batch.chunks_opened
        self.fallback_buffers += batch.fallback


class Engine(Protocol):
    """Fills planned batches, in the order of their plans."""

    ring: BatchRing
    reader: ChunkReader

    def run(self, plans: Iterator[BatchPlan]) -> Generator[Batch, None, None]:
        """Yield the batches of `plans`; closing the generator abandons the rest."""

    def close(self) -> None:
        """End threads and workers, and close files."""
