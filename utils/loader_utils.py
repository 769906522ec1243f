"""The ring of batch buffers, which are used again once nothing refers to them.

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
    """The position of each array of a batch in a ring buffer.

    Attributes
    ----------
    rows
        Samples in the largest batch.
    fields
        Byte offset, shape of a row and dtype of each array, by name.
    size
        Bytes of a ring buffer.
    """

    rows: int
    fields: dict[str, tuple[int, tuple[int, ...], str]]
    size: int

    @classmethod
    def of(cls, rows: int, arrays: dict[str, tuple[tuple[int, ...], str]]) -> BatchLayout:
        """Lay out arrays one after the other, each from its row shape and dtype."""
        fields, offset = {}, 0
        for name, (row_shape, dtype) in arrays.items():
            fields[name] = (offset, row_shape, dtype)
            length = rows * math.prod(row_shape) * np.dtype(dtype).itemsize
            offset += -(-length // ALIGN) * ALIGN
        return cls(rows, fields, max(ALIGN, offset))

    def views(self, memory: NDArray[np.uint8], rows: int) -> dict[str, NDArray[Any]]:
        """Return a buffer's arrays, ``[rows, ...]`` each, as views of `memory`."""
        out = {}
        for name, (offset, row_shape, dtype) in self.fields.items():
            length = rows * math.prod(row_shape) * np.dtype(dtype).itemsize
            out[name] = memory[offset : offset + length].view(dtype).reshape(rows, *row_shape)
        return out


class SharedBlock:
    """Anonymous memory that spawned workers map too.

    It has no name, so that the kernel frees it with its last holder, also after SIGKILL.
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
    # Python has it only if its C library does (glibc 2.27), so the platform does not tell.
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("tensor-warehouse-ring", os.MFD_CLOEXEC)
    else:  # macOS: an unlinked temporary file
        fd, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(fd, size)
    return fd


def private_memory(size: int) -> mmap.mmap:
    """Return zeroed memory of this process, in huge pages where there are any."""
    # A ring in pages of 4 KB cost 7% of the decoding speed (docs/log.md, 2026-11-25).
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def touch(memory: mmap.mmap) -> None:
    """Populate the pages of a ring, which needs Linux 5.14 and has no effect elsewhere."""
    # The first epoch would otherwise take its page faults while it decodes: populated rings, of
    # which the buffer freed last is used first, took it from 0.51 to 0.68 of the LZ4 limit.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            memory.madvise(MADV_POPULATE_WRITE)


class BatchRing:
    """Buffers of one layout, which are known by their numbers.

    `take` issues a buffer, and `export` turns it into arrays that give it back when the last of
    them is gone.

    Parameters
    ----------
    layout
        The layout of each buffer.
    slots
        The number of buffers.
    shared
        Whether spawned workers fill them.
    """

    def __init__(self, layout: BatchLayout, slots: int, *, shared: bool) -> None:
        self.layout, self.slots = layout, slots
        self.block = SharedBlock(layout.size * slots) if shared else None
        self.memory: Any = self.block.map if self.block else private_memory(layout.size * slots)
        touch(self.memory)
        self.free: deque[int] = deque(range(slots))

    def take(self) -> int | None:
        """Return the number of a free buffer, or None if all are in use."""
        # The buffer freed last is the one most likely in the processor's cache.
        try:
            return self.free.pop()
        except IndexError:
            return None

    def give_back(self, slot: int | None) -> None:
        """Free a buffer whose batch was not delivered."""
        if slot is not None:
            self.free.append(slot)

    def write_views(self, slot: int | None, rows: int) -> dict[str, NDArray[Any]]:
        """Return arrays to fill: those of a buffer, or fresh ones if there was none."""
        # Fresh memory and no wait: a consumer that keeps its batches would wait for ever.
        if slot is None:
            return self.layout.views(np.empty(self.layout.size, np.uint8), rows)
        return self.layout.views(self._raw(slot), rows)

    def export(self, slot: int, rows: int) -> dict[str, NDArray[Any]]:
        """Return a buffer's arrays for the consumer.

        The buffer is free again when the last reference to any of them is gone.
        """
        exporter = self._raw(slot)
        weakref.finalize(exporter, self.free.append, slot).atexit = False
        return self.layout.views(exporter, rows)

    def _raw(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.memory, np.uint8, self.layout.size, slot * self.layout.size)
