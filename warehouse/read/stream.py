"""`store: stream`: stored chunks fetched whole, in epoch order, a few ahead of the decoding, each
once an epoch.

For stores where a seek costs more than a read: object stores, network mounts, cold disks. `follow`
looks ahead in the plans, a fetch thread reads the next files into reused buffers, and a buffer is
free when the last batch that needs it is filled. Memory: at most (prefetch + chunks read in turn)
stored chunks. Given up: fetching for a sampler that ignores chunks, which would need them all.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import CorruptError, WorkerError
from warehouse.format.data_file import REMEDY, open_file
from warehouse.format.location import Location, Remote
from warehouse.format.stored_chunk import StoredChunk
from warehouse.read.chunks import ChunkReader, Plan, SplitSource, Verify

__all__ = ["FetchFailed", "SharedStreamReader", "StreamReader", "segment_bytes"]


EMPTY, READY, FAILED = 0, 1, 2


def segment_bytes(split: SplitSource, names: Sequence[str]) -> int:
    """The largest buffer a stored chunk's sharded files need."""
    sharded = [name for name in names if split.specs[name].inner is not None]
    sizes = [split.files.sizes_and_seals(f"{split.group}/{name}")[0] for name in sharded]
    return int(sum(sizes).max()) if sizes else 1  # type: ignore[union-attr]


class StreamReader(ChunkReader):
    """A ChunkReader whose sharded files are fetched ahead. in_turn: chunks read in turn (interleave
    x chunks_per_batch).

    buffers: (prefetch + in_turn) memoryviews of `segment_bytes` each. table: int64 [buffers, 3] =
    (chunk, number of the fetch, state), for processes that share the buffers. Raises CorruptError
    naming a file that ends early.
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
        self.buffers, self.table, self.window_size = buffers, table, 2 * in_turn + 2
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
        """Yield the plans, having asked for the chunks of the next ones.

        A plan's chunks are given back by `done`.
        """
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
        self.table[buffer, :2] = chunk, self.fetches
        self.table[buffer, 2] = state

    def _read(self, chunk: int, buffer: int) -> dict[str, StoredChunk]:
        opened = {}
        for name, path, rows, expected, offset in self.files_of(chunk):
            memory = self.buffers[buffer][offset : offset + expected[0]]
            fetch(path, memory)
            opened[name] = StoredChunk(path, self.split.specs[name], rows, expected, memory=memory)
        if isinstance(self.split.location, Remote):
            for name in self.plain:
                super().chunk(name, chunk)  # a request each: made here, not by who decodes
        self.fetches += 1
        self.chunks_opened += 1
        return opened

    def files_of(
        self, chunk: int
    ) -> Iterator[tuple[str, Location, int | NDArray[np.int64], tuple[int, int], int]]:
        """(array, file, samples, (size, seal), offset in the buffer) of each sharded array of a
        stored chunk.
        """
        yield from files_of(self, self.sharded, chunk)

    def raise_fetch_error(self, indices: NDArray[np.int64]) -> None:
        """Raise what went wrong fetching a chunk of a batch, if anything did."""
        for chunk in self.chunks_of(indices):
            self.fetched[chunk].result()

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        if name not in self.sharded:
            return super().chunk(name, chunk)
        return self.fetched[chunk].result()[name]

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        try:
            return super().fill(names, indices, out)
        finally:
            self.done(indices)

    def done(self, indices: NDArray[np.int64]) -> None:
        """A batch is filled.

        Give back the buffers that no known plan needs any more, and fetch on.
        """
        with self.guard:
            for chunk in self.chunks_of(indices):
                self.uses[chunk] -= 1
                if self.uses[chunk] <= 0:
                    del self.uses[chunk]
                    self.fetched.pop(chunk, None)
                    if chunk in self.held:
                        buffer = self.held.pop(chunk)
                        self.table[buffer, 2] = EMPTY
                        self.free.append(buffer)
        self._pump()

    def _reset(self) -> None:
        """Forget an abandoned epoch; waits for fetches under way, which write into buffers."""
        for promise in list(self.fetched.values()):
            promise.cancel()
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
        self.fetcher.shutdown(wait=True, cancel_futures=True)
        super().close()


def files_of(
    reader: ChunkReader, sharded: Sequence[str], chunk: int
) -> Iterator[tuple[str, Location, int | NDArray[np.int64], tuple[int, int], int]]:
    offset = 0
    for name in sharded:
        path, rows, expected = reader.locate(name, chunk)
        yield name, path, rows, expected, offset
        offset += expected[0]


class SharedStreamReader(ChunkReader):
    """A worker's view of the buffers its parent's StreamReader fills.

    Waits for a chunk that is still on its way.
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
        if name not in self.sharded:
            return super().chunk(name, chunk)
        buffer = self._wait_for(chunk)
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
    """The parent knows why a fetch failed, and raises that."""


def fetch(path: Location, memory: memoryview) -> None:
    """A whole stored chunk's file into `memory`, from wherever it lies.

    Raises CorruptError when its size is not the published one.
    """
    if isinstance(path, Remote):
        path.read_into(memory)
    else:
        read_whole(path, memory)


def read_whole(path: Path, memory: memoryview) -> None:
    """A whole file into `memory`, whose length is the published size.

    Raises CorruptError when the file is shorter or longer.
    """
    fd = open_file(path)
    try:
        found = os.fstat(fd).st_size
        at = 0
        while found == len(memory) and at < len(memory):
            count = os.preadv(fd, [memory[at:]], at)
            if count == 0:
                break
            at += count
        if at != len(memory) or not at:
            raise CorruptError(
                "a data file has the wrong size",
                where=path,
                expected=f"{len(memory)} bytes",
                found=found,
                remedy=REMEDY,
            )
    except OSError as error:
        raise CorruptError(
            "a data file cannot be read", where=path, found=error.strerror, remedy=REMEDY
        ) from None
    finally:
        os.close(fd)
