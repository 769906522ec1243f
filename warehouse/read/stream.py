"""Fetch whole stored chunks ahead of the decoding, in the order of an epoch: `store: stream`.

This is for stores where a seek costs more than a read: object stores, network mounts, cold disks.
`follow` looks ahead in the batch plans, a thread reads the next files into buffers that are reused,
and a buffer is free again when the last batch that needs it has been filled. Invariant: each stored
chunk is fetched once an epoch, and memory holds at most (prefetch + chunks read in turn) of them.
What was given up: samplers that ignore chunks, whose batches would need all of them at once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import WorkerError
from warehouse.format.location import Location, Remote
from warehouse.format.stored_chunk import StoredChunk
from warehouse.read.chunks import ChunkReader, Plan, SplitSource, Verify
from warehouse.read.fetch import fetch

__all__ = ["FetchFailed", "SharedStreamReader", "StreamReader", "segment_bytes"]


EMPTY, READY, FAILED = 0, 1, 2
"""The states of a buffer, in the last column of the table."""


def segment_bytes(split: SplitSource, names: Sequence[str]) -> int:
    """Return the size of the largest buffer that the sharded files of a stored chunk need."""
    sharded = [name for name in names if split.specs[name].inner is not None]
    if not sharded:
        # Memory maps and buffers of no bytes are refused.
        return 1

    sizes = [split.files.sizes_and_seals(f"{split.group}/{name}")[0] for name in sharded]
    return int(np.sum(sizes, axis=0).max())


class StreamReader(ChunkReader):
    """Read samples from stored chunks that a thread fetches ahead.

    Parameters
    ----------
    split
        The split to read.
    names
        The arrays that will be read.
    buffers
        (prefetch + in_turn) buffers of `segment_bytes` each.
    table
        int64 ``[buffers, 3]``: chunk, number of the fetch, and state of each buffer, for processes
        that share the buffers.
    in_turn
        The number of chunks that are read in turn (interleave x chunks_per_batch).
    verify
        When the checksum of a sample is compared.
    """

    def __init__(
        self,
        split: SplitSource,
        names: Sequence[str],
        buffers: Sequence[memoryview],
        table: NDArray[np.int64],
        *,
        in_turn: int,
        verify: Verify,
    ) -> None:
        super().__init__(split, access="pread", verify=verify, keep=64 + 8 * len(buffers))
        self.sharded = [name for name in names if split.specs[name].inner is not None]
        self.plain = [name for name in names if split.specs[name].inner is None]
        self.buffers, self.table = buffers, table
        # Plans that are looked at before the first of them is handed on.
        self.window_size = 2 * in_turn + 2

        # One thread: files are then read in the order of the epoch, each of them in sequence.
        self.fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self.free = deque(range(len(buffers)))
        self.fetched: OrderedDict[int, Future[dict[str, StoredChunk]]] = OrderedDict()
        self.held: dict[int, int] = {}
        self.waiting: deque[int] = deque()
        self.uses: Counter[int] = Counter()
        self.guard = threading.Lock()
        self.under_way: Future[None] | None = None
        self.fetches = 0

    def follow(self, plans: Iterator[Plan]) -> Iterator[Plan]:
        """Yield the plans of an epoch, after asking for the chunks of the plans that follow.

        `done` gives the chunks of a plan back.
        """
        # An epoch that was left in the middle never gave its chunks back.
        self._reset()

        window: deque[Plan] = deque()
        while True:
            while len(window) < self.window_size or self._wants_more():
                plan = next(plans, None)
                if plan is None:
                    break
                window.append(plan)
                self._enlist(self.chunks_of(plan.indices))

            if not window:
                return
            yield window.popleft()

    def chunks_of(self, indices: NDArray[np.int64]) -> list[int]:
        """Return the stored chunks that samples are in, ascending."""
        return [int(chunk) for chunk in np.unique(self.split.sample_index.locate(indices)[0])]

    def _wants_more(self) -> bool:
        with self.guard:
            return bool(self.free) and not self.waiting

    def _enlist(self, chunks: list[int]) -> None:
        with self.guard:
            for chunk in chunks:
                if not self.uses[chunk]:
                    self.waiting.append(chunk)
                    self.fetched[chunk] = Future()
                self.uses[chunk] += 1
        self._pump()

    def _pump(self) -> None:
        with self.guard:
            while self.waiting and self.free:
                chunk, buffer = self.waiting.popleft(), self.free.popleft()
                self.held[chunk] = buffer
                self.under_way = self.fetcher.submit(
                    self._fetch, chunk, buffer, self.fetched[chunk]
                )

    def _fetch(self, chunk: int, buffer: int, promise: Future[Any]) -> None:
        if not promise.set_running_or_notify_cancel():
            return
        try:
            promise.set_result(self._read(chunk, buffer))
            state = READY
        except BaseException as error:
            promise.set_exception(error)
            state = FAILED

        # The state last: a worker that sees it relies on the two numbers before it.
        self.table[buffer, :2] = chunk, self.fetches
        self.table[buffer, 2] = state

    def _read(self, chunk: int, buffer: int) -> dict[str, StoredChunk]:
        opened = {}
        for name, path, rows, expected, offset in files_of(self, self.sharded, chunk):
            memory = self.buffers[buffer][offset : offset + expected[0]]
            fetch(path, memory)
            opened[name] = StoredChunk(path, self.split.specs[name], rows, expected, memory=memory)

        # From an object store each small array is a request, which decoding threads must not wait
        # for.
        if isinstance(self.split.location, Remote):
            for name in self.plain:
                super().chunk(name, chunk)

        self.fetches += 1
        self.chunks_opened += 1
        return opened

    def raise_fetch_error(self, indices: NDArray[np.int64]) -> None:
        """Raise the error that fetching a chunk of a batch ended with, if it ended with one."""
        # Workers only learn that a fetch failed; the error itself, with its type, is here.
        for chunk in self.chunks_of(indices):
            self.fetched[chunk].result()

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        """Return a stored chunk, waiting for it while it is being fetched."""
        if name not in self.sharded:
            return super().chunk(name, chunk)

        return self.fetched[chunk].result()[name]

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Decode the samples of a batch and give its chunks back, also if that fails."""
        try:
            return super().fill(names, indices, out)
        finally:
            self.done(indices)

    def done(self, indices: NDArray[np.int64]) -> None:
        """Give back the buffers that no known plan needs any more, and fetch on."""
        with self.guard:
            for chunk in self.chunks_of(indices):
                # Neighbouring batches share a chunk, so that its plans are counted.
                self.uses[chunk] -= 1
                if self.uses[chunk] > 0:
                    continue

                del self.uses[chunk]
                self.fetched.pop(chunk, None)
                if chunk in self.held:
                    buffer = self.held.pop(chunk)
                    self.table[buffer, 2] = EMPTY
                    self.free.append(buffer)
        self._pump()

    def _reset(self) -> None:
        """Forget what is left of an epoch that was abandoned."""
        for promise in list(self.fetched.values()):
            promise.cancel()

        # A fetch under way writes into a buffer, which must not be given to the next epoch yet.
        if self.under_way is not None:
            self.under_way.exception()

        with self.guard:
            self.fetched.clear()
            self.held.clear()
            self.waiting.clear()
            self.uses.clear()
            self.table[:, 2] = EMPTY
            self.free = deque(range(len(self.buffers)))

    def close(self) -> None:
        """End the fetch thread and close all files."""
        self.fetcher.shutdown(wait=True, cancel_futures=True)
        super().close()


def files_of(
    reader: ChunkReader, sharded: Sequence[str], chunk: int
) -> Iterator[tuple[str, Location, int | NDArray[np.int64], tuple[int, int], int]]:
    """Yield (array, file, rows, (size, seal), offset in the buffer) of a chunk's sharded arrays.

    The offsets follow from the published sizes, so that a process that only shares the buffers
    finds the files in them without being told.
    """
    offset = 0
    for name in sharded:
        path, rows, expected = reader.locate(name, chunk)
        yield name, path, rows, expected, offset
        offset += expected[0]


class SharedStreamReader(ChunkReader):
    """Read, in a worker process, from the buffers that the StreamReader of its parent fills.

    Parameters
    ----------
    split, names, buffers, table, verify
        As for `StreamReader`.
    patience_s
        Seconds that the worker waits for a chunk before it gives up.

    Notes
    -----
    The worker waits, and not the parent before it issues a batch: that deadlocked, since the buffer
    that the chunk needs is freed by results that the same thread of the parent has to take in.
    """

    def __init__(
        self,
        split: SplitSource,
        names: Sequence[str],
        buffers: Sequence[memoryview],
        table: NDArray[np.int64],
        *,
        verify: Verify,
        patience_s: float,
    ) -> None:
        super().__init__(split, access="pread", verify=verify, keep=64)
        self.sharded = [name for name in names if split.specs[name].inner is not None]
        self.buffers, self.table, self.patience_s = buffers, table, patience_s
        self.opened: OrderedDict[int, dict[str, StoredChunk]] = OrderedDict()

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        """Return a stored chunk, waiting for it while its parent is fetching it.

        Raises
        ------
        FetchFailed
            If the parent could not fetch it.
        WorkerError
            If it does not arrive within `patience_s`.
        """
        if name not in self.sharded:
            return super().chunk(name, chunk)

        buffer = self._wait_for(chunk)
        # By the number of the fetch: in the next epoch the same chunk may lie in another buffer.
        serial = int(self.table[buffer, 1])
        if serial not in self.opened:
            views = self.buffers[buffer]
            self.opened[serial] = {
                each: StoredChunk(
                    path,
                    self.split.specs[each],
                    rows,
                    expected,
                    memory=views[offset : offset + expected[0]],
                )
                for each, path, rows, expected, offset in files_of(self, self.sharded, chunk)
            }
            while len(self.opened) > len(self.buffers):
                self.opened.popitem(last=False)

        return self.opened[serial][name]

    def _wait_for(self, chunk: int) -> int:
        deadline = time.monotonic() + self.patience_s
        while True:
            at = np.flatnonzero((self.table[:, 0] == chunk) & (self.table[:, 2] != EMPTY))
            if at.size:
                if self.table[at[0], 2] == FAILED:
                    raise FetchFailed(
                        "the stored chunk could not be fetched", where=f"chunk {chunk}"
                    )
                return int(at[0])

            if time.monotonic() > deadline:
                raise WorkerError(
                    "a stored chunk did not arrive",
                    where=f"chunk {chunk}",
                    expected=f"within {self.patience_s} s",
                )

            time.sleep(0.0005)


class FetchFailed(WorkerError):
    """A chunk could not be fetched. The parent knows why, and raises that error instead."""
