"""The ring of reused batch buffers: slots given out, filled by any thread or process, and taken
back when nothing refers to them.

Purpose: `BatchRing` hands out slots; a slot's arrays may be viewed, sliced, detached and kept, and
  are never overwritten while they are.
Used by: utils.caching.cache_file, utils.caching.cache_stats, utils.loading.batches,
  utils.loading.engines, utils.loading.local, utils.loading.sources, utils.loading.spawn
Design notes: fresh 28 MB batches cost more in page faults than LZ4 costs in decoding, so buffers
  are reused. The finalizer hangs on the NumPy array that exports the slot's memory: every view,
  tensor and DLPack capsule keeps that one alive (one on a tensor would fire while its views live).
  Shared rings are memfd, inherited by spawned workers, since /dev/shm has 64 MB in a default
  container.
Assistant guidance: when extending: a slot is issued by the parent only; abandoned and failed
  batches give theirs back; none free means a fresh buffer, which the loader counts, never a wait.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchLayout", "BatchRing", "SharedBlock", "private_memory"]

ALIGN = 4096
MADV_POPULATE_WRITE = 23


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where each array of a batch lies in a slot: name -> (byte offset, row shape, dtype).

    `rows` is the largest batch.
    """

    rows: int
    fields: dict[str, tuple[int, tuple[int, ...], str]]
    size: int

    @classmethod
    def of(cls, rows: int, arrays: dict[str, tuple[tuple[int, ...], str]]) -> BatchLayout:
        fields, offset = {}, 0
        for name, (row_shape, dtype) in arrays.items():
            fields[name] = (offset, row_shape, dtype)
            length = rows * math.prod(row_shape) * np.dtype(dtype).itemsize
            offset += -(-length // ALIGN) * ALIGN
        return cls(rows, fields, max(ALIGN, offset))

    def views(self, memory: NDArray[np.uint8], rows: int) -> dict[str, NDArray[Any]]:
        """The slot's arrays, [rows, ...] each, as views of `memory`."""
        out = {}
        for name, (offset, row_shape, dtype) in self.fields.items():
            length = rows * math.prod(row_shape) * np.dtype(dtype).itemsize
            out[name] = memory[offset : offset + length].view(dtype).reshape(rows, *row_shape)
        return out


class SharedBlock:
    """Anonymous memory that spawned workers map too.

    Freed with its last holder, also after kill -9: it has no name.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        self.size = size
        self.fd = _anonymous_file(size) if fd is None else fd
        self.map = mmap.mmap(self.fd, size)

    def __reduce__(self) -> tuple[Any, ...]:
        # Only a process being spawned can inherit the descriptor, which is when a DataLoader
        # pickles it.
        return _open_block, (self.size, reduction.DupFd(self.fd))

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_block(size: int, fd: Any) -> SharedBlock:
    return SharedBlock(size, fd.detach())


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tensor-warehouse-ring", os.MFD_CLOEXEC)
    else:  # macOS: an unlinked temporary file
        fd, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(fd, size)
    return fd


def private_memory(size: int) -> mmap.mmap:
    """Zeroed memory of this process, in huge pages where there are any.

    A ring in 4 KB pages cost 7% of the decoding speed.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def touch(memory: mmap.mmap) -> None:
    """Have the pages there before the first epoch, which would otherwise pay for them while it
    decodes (Linux 5.14; else no effect).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            memory.madvise(MADV_POPULATE_WRITE)


class BatchRing:
    """`slots` buffers of one layout.

    `take` issues a slot, `export` turns it into arrays that give it back by themselves.
    """

    def __init__(self, layout: BatchLayout, slots: int, *, shared: bool) -> None:
        self.layout, self.slots = layout, slots
        self.block = SharedBlock(layout.size * slots) if shared else None
        self.memory: Any = self.block.map if self.block else private_memory(layout.size * slots)
        touch(self.memory)
        self.free: deque[int] = deque(range(slots))

    def take(self) -> int | None:
        """A free slot, or None when every slot is in use.

        The one freed last is the one most likely in the cache.
        """
        try:
            return self.free.pop()
        except IndexError:
            return None

    def give_back(self, slot: int | None) -> None:
        if slot is not None:
            self.free.append(slot)

    def write_views(self, slot: int | None, rows: int) -> dict[str, NDArray[Any]]:
        """Arrays to fill: the slot's, or fresh ones when there was no slot."""
        if slot is None:
            return self.layout.views(np.empty(self.layout.size, np.uint8), rows)
        return self.layout.views(self._raw(slot), rows)

    def export(self, slot: int, rows: int) -> dict[str, NDArray[Any]]:
        """The slot's arrays for the consumer.

        The slot is free again when the last reference to any of them is gone.
        """
        exporter = self._raw(slot)
        weakref.finalize(exporter, self.free.append, slot).atexit = False
        return self.layout.views(exporter, rows)

    def _raw(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.memory, np.uint8, self.layout.size, slot * self.layout.size)
