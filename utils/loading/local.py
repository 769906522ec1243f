"""The engines of this process: decode threads, or none ("inline").

Purpose: `LocalEngine` fills batches through one reader that its threads share.
Used by: utils.loading.engines
Design notes: a decode thread takes its ring buffer when it begins and not when its plan is issued,
  so that a fast consumer's threads go round few buffers, which stay in the processor's cache.
Assistant guidance: when extending: whatever ends a wait, the ring buffers of the batches under way
  must come back before the next epoch begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from utils.loader_utils import BatchLayout, BatchRing
from utils.loading.batches import Batch, Filled
from utils.loading.orders import BatchPlan
from warehouse.read.chunks import ChunkReader

__all__ = ["LocalEngine"]


class LocalEngine:
    """Fill batches in threads of this process.

    Parameters
    ----------
    reader
        The reader that all threads share.
    names
        The arrays to read.
    layout
        The layout of a ring buffer.
    workers
        The number of threads; with 0 each batch is filled when it is asked for ("inline").
    in_flight
        Batches that are issued ahead.
    spare
        Ring buffers beyond those of the batches in flight, for copies to a device.
    """

    def __init__(
        self,
        reader: ChunkReader,
        names: list[str],
        layout: BatchLayout,
        workers: int,
        in_flight: int,
        spare: int,
    ) -> None:
        self.reader, self.names = reader, names
        self.in_flight = in_flight
        # Two more than are in flight, for the batches that the consumer holds.
        self.ring = BatchRing(layout, in_flight + 2 + spare, shared=False)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def run(self, plans: Iterator[BatchPlan]) -> Generator[Batch, None, None]:
        """Yield the batches of `plans`; closing the generator abandons the rest."""
        counted = self.reader.chunks_opened
        plans = self.reader.follow(plans)
        waiting: deque[tuple[BatchPlan, Future[Any] | None]] = deque()
        try:
            while True:
                while len(waiting) < self.in_flight and (plan := next(plans, None)) is not None:
                    waiting.append(
                        (plan, self.pool.submit(self._fill, plan) if self.pool else None)
                    )
                if not waiting:
                    return
                plan, future = waiting[0]
                # Stays in `waiting` until it is filled: whatever ends the wait, its slot is given
                # back below.
                slot, arrays, filled = future.result() if future else self._fill(plan)
                waiting.popleft()
                exported = arrays if slot is None else self.ring.export(slot, len(plan.indices))
                opened, counted = self.reader.chunks_opened - counted, self.reader.chunks_opened
                yield Batch(
                    plan, exported, filled.decoded, filled.bytes_read, opened, int(slot is None)
                )
                # A name left here would keep the buffer in use until the next batch is filled.
                del arrays, exported
        finally:
            for _, future in waiting:
                # A running one writes into its slot until it is done; a failed one gave its slot
                # back itself.
                if future is not None and not future.cancel() and future.exception() is None:
                    self.ring.give_back(future.result()[0])

    def _fill(self, plan: BatchPlan) -> tuple[int | None, dict[str, NDArray[Any]], Filled]:
        # The ring buffer is taken only now, so that a fast consumer's threads reuse few buffers,
        # which stay in the processor's cache. A batch stays one thread's: two on one batch were not
        # faster in 39 rounds (docs/log.md, 2026-11-25).
        slot = self.ring.take()
        try:
            out = self.ring.write_views(slot, len(plan.indices))
            return slot, out, Filled(*self.reader.fill(self.names, plan.indices, out))
        except BaseException:
            self.ring.give_back(slot)
            raise

    def close(self) -> None:
        """End the threads, and close the reader's files."""
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.reader.close()
