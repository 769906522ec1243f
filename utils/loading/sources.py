"""Readers for a read plan: those of this process, and what spawned workers need for theirs.

Purpose: `open_source` makes the parent's reader, its memory, and the `Source` that workers receive.
Used by: utils.loading.engines, utils.loading.spawn
Design notes: a reader lives in one process. A `Source` is pickled to spawned workers, so that each
  opens its own handles: the split by path or URL, or memory that the parent shares.
Assistant guidance: when extending: follow the plan; nothing here may ask again how an array can be
  read. Every reader fills batches through `fill(names, indices, out)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.loader_utils import SharedBlock, private_memory
from utils.loading.batch_sampler import BatchSampler
from utils.loading.options import LoaderOptions
from utils.loading.stores import Access, ReadPlan
from warehouse.errors import ConfigError
from warehouse.read.chunks import ChunkReader, Verify
from warehouse.read.memory import MemoryReader, decode_split
from warehouse.read.stream import SharedStreamReader, StreamReader, segment_bytes
from warehouse.read.version import Split

__all__ = ["Source", "open_source"]

ALIGN = 64
TABLE_BYTES = 1 << 16
"""Room for a stream's table, in front of its buffers: 24 bytes a buffer."""


@dataclass(slots=True)
class Source:
    """What a spawned worker reads from; it is pickled once, when the worker starts.

    Parameters
    ----------
    split, names
        The split, and the arrays to read from it.
    plan
        How they are read.
    options
        The loader's options.
    block
        Memory shared with the parent: decoded arrays (store "memory") or buffers (store "stream").
    buffer_bytes
        The size of one of a stream's buffers.
    """

    split: Split
    names: list[str]
    plan: ReadPlan
    options: LoaderOptions
    block: SharedBlock | None = None
    buffer_bytes: int = 0

    def reader(self) -> ChunkReader:
        """Open a reader in the process that calls."""
        verify = self.options.verify
        if self.plan.store == "memory":
            assert self.block is not None
            views = decoded_views(self.split, self.names, self.block.map)
            return MemoryReader(self.split.source, views)

        if self.plan.store == "stream":
            assert self.block is not None
            table, buffers = stream_views(self.block.map, self.buffer_bytes)
            return SharedStreamReader(
                self.split.source,
                self.names,
                buffers,
                table,
                verify=verify,
                patience_s=self.options.worker_timeout,
            )

        return open_reader(self.split, self.plan.access, verify, 64)


def open_source(
    plan: ReadPlan, split: Split, names: list[str], sampler: BatchSampler, options: LoaderOptions
) -> tuple[ChunkReader, Source]:
    """Open the parent's reader, and describe to spawned workers what they read from.

    Notes
    -----
    Store "memory" takes the size of the decoded split, and "stream" that of as many stored chunks
    as are prefetched and read in turn. The others take hardly any memory.
    """
    source = Source(split, names, plan, options)
    if plan.store == "memory":
        return _open_memory(source), source
    in_turn = sampler.interleave * sampler.chunks_per_batch
    if plan.store == "stream":
        return _open_stream(source, in_turn), source

    # Room for the files of the chunks read in turn, and for those of the next ones.
    keep = min(1024, 64 + 2 * in_turn * len(names))
    return open_reader(split, plan.access, options.verify, keep), source


def _open_memory(source: Source) -> MemoryReader:
    split, names, options = source.split, source.names, source.options
    row_bytes = (split.specs[name].row_bytes for name in names)
    views = decoded_views(
        split, names, _memory(source, sum(_aligned(len(split) * row) for row in row_bytes))
    )
    threads = max(1, options.num_workers)

    def load() -> int:
        # Every checksum, since each chunk is read once and never again.
        reader = open_reader(split, source.plan.access, "always", 4 * threads * len(names))
        return decode_split(reader, names, views, threads=threads)

    return MemoryReader(split.source, views, load)


def _open_stream(source: Source, in_turn: int) -> StreamReader:
    source.buffer_bytes = segment_bytes(source.split.source, source.names)
    size = TABLE_BYTES + source.buffer_bytes * (source.options.prefetch + in_turn)
    table, buffers = stream_views(_memory(source, size), source.buffer_bytes)
    return StreamReader(
        source.split.source,
        source.names,
        buffers,
        table,
        in_turn=in_turn,
        verify=source.options.verify,
    )


def _memory(source: Source, size: int) -> mmap:
    """Return memory of this process or, if workers are spawned, memory that they share."""
    if not source.options.spawns:
        return private_memory(max(1, size))
    source.block = SharedBlock(max(1, size))
    return source.block.map


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def decoded_views(split: Split, names: Sequence[str], memory: mmap) -> dict[str, NDArray[Any]]:
    """Return the decoded split's arrays, ``[samples, ...]`` each, as views of `memory`."""
    # Parent and workers compute the same offsets from the split; none have to be sent.
    views, offset = {}, 0
    for name in names:
        spec = split.specs[name]
        count = math.prod(spec.shape)
        views[name] = np.frombuffer(memory, spec.dtype, count, offset).reshape(spec.shape)
        offset += _aligned(count * np.dtype(spec.dtype).itemsize)
    return views


def stream_views(memory: mmap, buffer_bytes: int) -> tuple[NDArray[np.int64], list[memoryview]]:
    """Return a stream's table, int64 ``[buffers, 3]``, and its buffers as views of `memory`."""
    count = (len(memory) - TABLE_BYTES) // buffer_bytes
    if 24 * count > TABLE_BYTES:
        raise ConfigError(
            "store='stream' cannot read so many stored chunks in turn",
            expected=f"at most {TABLE_BYTES // 24}",
            found=count,
            remedy="lower interleave, chunks_per_batch or prefetch",
        )
    view = memoryview(memory)
    starts = range(TABLE_BYTES, TABLE_BYTES + count * buffer_bytes, buffer_bytes)
    buffers = [view[start : start + buffer_bytes] for start in starts]
    return np.frombuffer(memory, np.int64, 3 * count).reshape(count, 3), buffers


def open_reader(split: Split, access: Access, verify: Verify, keep: int) -> ChunkReader:
    """Open a reader; "library" reads through zarr-python, for any codec."""
    if access == "library":
        # Imported here so that reading our own codecs never loads zarr.
        from warehouse.read.zarr_python import ZarrPythonReader

        return ZarrPythonReader(split.source, verify=verify, keep=keep)
    return split.reader(access=access, verify=verify, keep=keep)
