"""The engine of spawned worker processes: a torch DataLoader that decodes into a shared ring.

Purpose: `SpawnEngine` fills batches in other processes; only buffer numbers, indices and counters
  travel.
Used by: utils.loading.engines
Design notes: a worker gets its ring buffer from the parent with its plan, since only one process
  can know which are free. Errors of a worker come back as values, so that their type and their one
  line survive. What a failed worker leaves behind is killed: one that hangs answers no request to
  end.
Assistant guidance: when extending: private names of torch's DataLoader are used to end workers;
  tests/utils/test_loader_workers.py holds what is expected of them.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.loader_utils import BatchLayout, BatchRing, SharedBlock
from utils.loading.batches import Batch, Filled
from utils.loading.orders import BatchPlan
from utils.loading.sources import Source
from warehouse.errors import WarehouseError, WorkerError
from warehouse.read.chunks import ChunkReader
from warehouse.read.stream import FetchFailed

__all__ = ["SpawnEngine"]


class _FillBuffer:
    """The `dataset` of spawned workers, which fills a buffer of the shared ring."""

    def __init__(self, source: Source, layout: BatchLayout, block: SharedBlock) -> None:
        self.source, self.layout, self.block = source, layout, block
        self.reader: ChunkReader | None = None

    def __getitem__(self, job: tuple[int | None, NDArray[np.int64]]) -> Filled:
        slot, indices = job
        try:
            # Opened here, at the first job, since file handles cannot be sent to a worker.
            if self.reader is None:
                self.reader = self.source.reader()
            if slot is None:
                memory = np.empty(self.layout.size, np.uint8)
            else:
                memory = np.frombuffer(
                    self.block.map, np.uint8, self.layout.size, slot * self.layout.size
                )
            out = self.layout.views(memory, len(indices))
            opened = self.reader.chunks_opened
            filled = Filled(*self.reader.fill(self.source.names, indices, out))
            filled.chunks_opened = self.reader.chunks_opened - opened
            if slot is None:
                filled.arrays = out
            return filled
        except WarehouseError as error:
            # As a value: torch would wrap an exception, and its type and message would be lost.
            return Filled(error=error)
        except Exception as error:
            return Filled(
                error=WorkerError(
                    "a loader worker failed",
                    where=_own_name(),
                    found=f"{type(error).__name__}: {error}"[:200],
                )
            )


class _IssuedJobs:
    """The `sampler` of the DataLoader, which issues a ring buffer with each plan.

    It runs in the parent, and remembers what was issued, in order.
    """

    def __init__(self, ring: BatchRing) -> None:
        self.ring = ring
        self.plans: Iterator[BatchPlan] = iter(())
        self.stopped = False
        self.issued: deque[tuple[BatchPlan, int | None]] = deque()

    def __iter__(self) -> Iterator[tuple[int | None, NDArray[np.int64]]]:
        while not self.stopped and (plan := next(self.plans, None)) is not None:
            slot = self.ring.take()
            self.issued.append((plan, slot))
            yield slot, plan.indices


class SpawnEngine:
    """A torch DataLoader with spawned workers that decode into a shared ring.

    Parameters
    ----------
    reader
        The parent's reader.
    source
        What the workers read from.
    layout
        The layout of a ring buffer.
    workers
        The number of worker processes.
    prefetch_factor
        Batches in flight for each worker.
    timeout_s
        Seconds until a worker that does not answer counts as hanging.
    spare
        Ring buffers beyond those of the batches in flight, for copies to a device.
    """

    def __init__(
        self,
        reader: ChunkReader,
        source: Source,
        layout: BatchLayout,
        workers: int,
        prefetch_factor: int,
        timeout_s: int,
        spare: int,
    ) -> None:
        from torch.utils.data import DataLoader

        self.reader = reader
        self.ring = BatchRing(layout, workers * prefetch_factor + 2 + spare, shared=True)
        self.jobs = _IssuedJobs(self.ring)
        self.stream: Any = None
        assert self.ring.block is not None
        work: Any = _FillBuffer(source, layout, self.ring.block)
        self.loader: Any = DataLoader(
            work,
            batch_size=None,
            sampler=self.jobs,
            num_workers=workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=True,
            multiprocessing_context="spawn",
            timeout=timeout_s,
            collate_fn=_as_is,
            worker_init_fn=_quiet_worker,
        )

    def run(self, plans: Iterator[BatchPlan]) -> Generator[Batch, None, None]:
        """Yield the batches of `plans`; closing the generator abandons the rest."""
        self._drain()
        counted = self.reader.chunks_opened
        self.jobs.plans, self.jobs.stopped = self.reader.follow(plans), False
        try:
            self.stream = iter(self.loader)
        except RuntimeError as error:
            raise self._failed(error) from None
        while (taken := self._next()) is not None:
            plan, slot, filled = taken
            if filled.error is not None:
                self.ring.give_back(slot)
                if isinstance(filled.error, FetchFailed):
                    self.reader.raise_fetch_error(plan.indices)
                raise filled.error
            self.reader.done(plan.indices)
            arrays = filled.arrays if slot is None else self.ring.export(slot, len(plan.indices))
            opened, counted = (
                filled.chunks_opened + self.reader.chunks_opened - counted,
                self.reader.chunks_opened,
            )
            # A batch without a ring buffer was decoded into a fresh one, and travelled by pickle.
            yield Batch(plan, arrays, filled.decoded, filled.bytes_read, opened, int(slot is None))
            del arrays, filled, taken

    def _next(self) -> tuple[BatchPlan, int | None, Filled] | None:
        try:
            filled = next(self.stream, None)
        except RuntimeError as error:
            raise self._failed(error) from None
        if filled is None:
            self.stream = None
            return None
        return *self.jobs.issued.popleft(), filled

    def _drain(self) -> None:
        """Collect the batches of an abandoned epoch that workers still hold.

        Only then are its ring buffers, and those of a stream, free.
        """
        self.jobs.stopped = True
        while self.stream is not None and self.jobs.issued and (taken := self._next()) is not None:
            plan, slot, filled = taken
            self.ring.give_back(slot)
            if filled.error is None:
                self.reader.done(plan.indices)

    def _failed(self, error: RuntimeError) -> WorkerError:
        """End all workers, and turn torch's report of a dead or silent one into a typed error.

        Every ring buffer is free again afterwards.
        """
        failure = worker_error(error, self.loader._iterator)
        self._end_workers(kill=True)
        return failure

    def _end_workers(self, *, kill: bool = False) -> None:
        # With `kill`, at once: a worker that hangs, or is stopped, answers no request to end.
        iterator = self.loader._iterator
        if iterator is not None:
            workers = list(iterator._workers)
            if kill:
                _disown(iterator)
                for worker in workers:
                    worker.kill()
            feeders = [
                queue._thread for queue in iterator._index_queues if queue._thread is not None
            ]
            iterator._shutdown_workers()
            self.loader._iterator = None
            # Left alone, a feeder may let go of its semaphores while the interpreter ends, and be
            # cut off between unlinking and telling.
            for feeder in feeders:
                feeder.join(timeout=5)
            for worker in workers:
                # A stopped process gets SIGTERM only when it is continued.
                if worker.is_alive():
                    worker.kill()
                    worker.join(timeout=5)
        self.stream = None
        while self.jobs.issued:
            self.ring.give_back(self.jobs.issued.popleft()[1])

    def close(self) -> None:
        """End the workers, and close the reader's files."""
        self._end_workers()
        self.reader.close()


def _as_is(item: Any) -> Any:
    return item


def _quiet_worker(_: int) -> None:
    # A terminal sends Ctrl-C to all processes. The parent handles it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _own_name() -> str:
    from torch.utils.data import get_worker_info

    info = get_worker_info()
    return f"worker {info.id if info else 0} (pid {os.getpid()})"


def _disown(iterator: Any) -> None:
    """Have torch forget its workers.

    Its SIGCHLD handler would report the ones that we end as failures.
    """
    from torch.utils.data import _utils

    if iterator._worker_pids_set:
        _utils.signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
        iterator._worker_pids_set = False


def worker_error(error: RuntimeError, iterator: Any) -> WorkerError:
    """Return the error for a dead or silent worker, which names it and how it ended.

    Parameters
    ----------
    error
        What torch raised.
    iterator
        The DataLoader's iterator; None if none was started.
    """
    text = str(error).split("\n", 1)[0]
    workers = list(enumerate(iterator._workers)) if iterator is not None else []
    if "timed out" in text:
        number = iterator._task_info.get(iterator._rcvd_idx, (0,))[0]
        where, silence = (
            f"worker {number} (pid {workers[number][1].pid})",
            f"no answer for {iterator._timeout:g} s",
        )
        remedy = (
            "is the warehouse on a slow mount? raise --loader.worker_timeout, "
            "or try --loader.engine thread"
        )
        return WorkerError("a loader worker hangs", where=where, found=silence, remedy=remedy)
    dead = [(number, worker) for number, worker in workers if not worker.is_alive()]
    names = ", ".join(f"worker {number} (pid {worker.pid})" for number, worker in dead) or None
    ends = ", ".join(exit_name(worker.exitcode) for _, worker in dead) or text
    return WorkerError(
        "a loader worker died",
        where=names,
        found=ends,
        remedy="look for the out-of-memory killer; try --loader.engine thread",
    )


def exit_name(code: int | None) -> str:
    """Describe an exit code of multiprocessing, in which -9 stands for the signal SIGKILL."""
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
