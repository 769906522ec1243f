"""Where a split's bytes come from while it is read: mapped files, reads, RAM, a stream of whole
chunks, or zarr-python.

Purpose: `choose_store` settles `store: auto` and says why; `open_source` makes the reader and
  whatever memory it needs.
Used by: features.run_finetuning, segmentation.training, utils.caching.cached_passes, utils.loader,
  utils.loading.engines
Design notes: auto goes by decoded size against the memory that is free (also under a cgroup limit),
  by codecs, by where the version lies, and by stored size. A reader lives in the parent; a `Source`
  is what a spawned worker needs to read the same: the split by path or URL, or shared memory.
Assistant guidance: when extending: every store fills batches through `fill(names, indices, out)`;
  none may change what is delivered.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from utils.loader_utils import SharedBlock, private_memory
from utils.samplers import BatchSampler, RandomBatchSampler
from warehouse.errors import ConfigError
from warehouse.format.location import Remote
from warehouse.read.memory import MemoryReader, decode_split, split_bytes
from warehouse.read.stream import SharedStreamReader, StreamReader, segment_bytes
from warehouse.read.version import ChunkReader, Split

__all__ = ["STORES", "Source", "StoreChoice", "bounded_memory_store", "choose_store", "open_source"]

STORES = ("auto", "mmap", "pread", "memory", "stream", "library")
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "fuse.sshfs",
    "lustre",
    "ceph",
    "glusterfs",
    "9p",
    "beegfs",
    "gpfs",
    "afs",
}
ALIGN = 64
TABLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class StoreChoice:
    """The store taken and why, in half a sentence."""

    store: Literal["mmap", "pread", "memory", "stream", "library"]
    why: str


def choose_store(
    store: str,
    split: Split,
    names: Sequence[str],
    sampler: BatchSampler,
    *,
    available: int | None = None,
    kind: str | None = None,
) -> StoreChoice:
    """Settle `auto`, check the rest. available, kind.

    Free memory in bytes and file system, measured when None. Raises ConfigError.
    """
    if store not in STORES:
        raise ConfigError("unknown store", expected=", ".join(STORES), found=repr(store))
    by_chunk = not isinstance(sampler, RandomBatchSampler)
    decoded = split_bytes(split, names)
    available = free_memory() if available is None else available
    if store == "memory" and decoded > available:
        raise ConfigError(
            "the decoded split does not fit into memory",
            where=repr(split),
            expected=f"{decoded / 1e6:.0f} MB",
            found=f"{available / 1e6:.0f} MB free",
            remedy="use --loader.store mmap or stream",
        )
    if store == "stream" and not by_chunk:
        raise ConfigError(
            "store='stream' fetches chunk by chunk, RandomBatchSampler needs them all",
            remedy="use store='mmap' or ChunkBatchSampler",
        )
    _refuse_unreadable(store, split, names)
    if store != "auto":
        return StoreChoice(store, "as asked for")  # type: ignore[arg-type]
    if decoded <= available / 8:
        return StoreChoice(
            "memory",
            f"the decoded split ({decoded / 1e6:.0f} MB) takes less than an eighth of the free memory",
        )
    return _by_location(split, names, by_chunk, available, kind)


def _refuse_unreadable(store: str, split: Split, names: Sequence[str]) -> None:
    location = split.warehouse.store
    remedy = "use --loader.store auto"
    if store in {"mmap", "pread"} and isinstance(location, Remote):
        raise ConfigError(
            f"store={store!r} reads local files",
            where=location,
            expected="stream, memory, library or auto",
            found=store,
            remedy=remedy,
        )
    if store in {"mmap", "pread", "stream"}:
        for name, why in split.foreign(names).items():
            what = f"store={store!r} cannot read array {name!r}: {why}"
            raise ConfigError(
                what,
                where=repr(split),
                expected="library, memory or auto",
                found=store,
                remedy=remedy,
            )


def _by_location(
    split: Split, names: Sequence[str], by_chunk: bool, available: int, kind: str | None
) -> StoreChoice:
    """For a split that is too large to decode into memory.

    By its codecs, where it lies, and the size of its files.
    """
    location = split.warehouse.store
    for name, why in split.foreign(names).items():
        return StoreChoice("library", f"only zarr-python can read array {name!r}: {why}")
    if isinstance(location, Remote):
        if by_chunk:
            return StoreChoice(
                "stream",
                f"the warehouse lies in an object store ({location}): stored chunks are fetched whole",
            )
        return StoreChoice(
            "library",
            f"the warehouse lies in an object store ({location}), RandomBatchSampler takes from any chunk at any time",
        )
    kind = file_system(os.path.realpath(location)) if kind is None else kind
    if kind in NETWORK_FILE_SYSTEMS:
        return StoreChoice("stream" if by_chunk else "pread", f"the warehouse lies on {kind}")
    stored = sum(int(split.warehouse.files(f"{split.group}/{name}")[0].sum()) for name in names)
    if stored > available and by_chunk:
        return StoreChoice(
            "stream", f"the files ({stored / 1e6:.0f} MB) are larger than the page cache can become"
        )
    return StoreChoice(
        "mmap", f"the files ({stored / 1e6:.0f} MB) are local and fit the page cache"
    )


def bounded_memory_store(split: Split, names: Sequence[str]) -> str:
    """How to read arrays without holding the split in memory, decoded or mapped.

    For a run whose memory is bounded.
    """
    if split.foreign(names):
        return "library"
    return "stream" if isinstance(split.warehouse.store, Remote) else "pread"


def free_memory() -> int:
    """Bytes that can be taken without swapping.

    The machine's, or what the cgroup leaves where that is less.
    """
    free = int(psutil.virtual_memory().available)
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            text = limit.read().strip()
            if text == "max":
                return free
            taken = int(used.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as stat:
            # Page cache counts as used there, but gives way.
            cache = next(
                (int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0
            )
        return max(0, min(free, int(text) - taken + cache))
    except (OSError, ValueError):
        return free


def file_system(path: str) -> str:
    """The type of the file system `path` lies on, from /proc/mounts.

    "unknown" where that cannot be read.
    """
    try:
        with open("/proc/mounts", encoding="utf-8") as mounts:
            lines = [line.split() for line in mounts]
    except OSError:
        return "unknown"
    inside = (
        line for line in lines if path == line[1] or path.startswith(line[1].rstrip("/") + "/")
    )
    best = max(inside, key=lambda line: len(line[1]), default=None)
    return best[2] if best else "unknown"


@dataclass(slots=True)
class Source:
    """What a spawned worker reads from; pickled once, when it starts. block.

    Decoded arrays (memory) or buffers (stream).
    """

    split: Split
    names: list[str]
    store: str
    verify: Any
    patience_s: float
    block: SharedBlock | None = None
    buffer_bytes: int = 0

    def reader(self) -> ChunkReader:
        if self.store == "memory":
            assert self.block is not None
            return MemoryReader(self.split, decoded_views(self.split, self.names, self.block.map))
        if self.store == "stream":
            assert self.block is not None
            table, buffers = stream_views(self.block.map, self.buffer_bytes)
            return SharedStreamReader(
                self.split,
                self.names,
                buffers,
                table,
                verify=self.verify,
                patience_s=self.patience_s,
            )
        return open_reader(self.split, self.store, self.verify, 64)


def decoded_views(split: Split, names: Sequence[str], memory: Any) -> dict[str, NDArray[Any]]:
    """The decoded split's arrays, [samples, ...] each, one after the other in `memory`."""
    views, offset = {}, 0
    for name in names:
        spec = split.specs[name]
        count = math.prod(spec.shape)
        views[name] = np.frombuffer(memory, spec.dtype, count, offset).reshape(spec.shape)
        offset += -(-count * np.dtype(spec.dtype).itemsize // ALIGN) * ALIGN
    return views


def stream_views(memory: Any, buffer_bytes: int) -> tuple[NDArray[np.int64], list[memoryview]]:
    """The table (int64 [buffers, 3]) and the buffers of a stream, in one piece of memory."""
    count = (len(memory) - TABLE_BYTES) // buffer_bytes
    if 24 * count > TABLE_BYTES:
        raise ConfigError(
            "too many stored chunks in turn for store='stream'",
            expected=f"at most {TABLE_BYTES // 24}",
            found=count,
        )
    view = memoryview(memory)
    buffers = [
        view[TABLE_BYTES + at * buffer_bytes : TABLE_BYTES + (at + 1) * buffer_bytes]
        for at in range(count)
    ]
    return np.frombuffer(memory, np.int64, 3 * count).reshape(count, 3), buffers


def open_source(
    store: str,
    split: Split,
    names: list[str],
    sampler: BatchSampler,
    *,
    shared: bool,
    verify: Any,
    prefetch: int,
    threads: int,
    patience_s: float,
) -> tuple[ChunkReader, Source]:
    """The parent's reader and what its spawned workers (`shared`) need.

    Memory: the decoded split, or prefetch + chunks in turn.
    """
    in_turn = sampler.interleave * sampler.chunks_per_batch
    source = Source(split, names, store, verify, patience_s)
    if store == "memory":
        size = sum(-(-len(split) * split.specs[name].row_bytes // ALIGN) * ALIGN for name in names)
        source.block = SharedBlock(max(1, size)) if shared else None
        views = decoded_views(
            split, names, source.block.map if source.block else private_memory(max(1, size))
        )
        access = "library" if split.foreign(names) else "pread"

        def load() -> int:
            reader = open_reader(split, access, "always", 4 * max(1, threads) * len(names))
            return decode_split(reader, names, views, threads=max(1, threads))

        return MemoryReader(split, views, load), source
    if store == "stream":
        source.buffer_bytes = segment_bytes(split, names)
        size = TABLE_BYTES + source.buffer_bytes * (prefetch + in_turn)
        source.block = SharedBlock(size) if shared else None
        table, buffers = stream_views(
            source.block.map if source.block else private_memory(size), source.buffer_bytes
        )
        return StreamReader(split, names, buffers, table, in_turn=in_turn, verify=verify), source
    keep = min(1024, 64 + 2 * in_turn * len(names))
    return open_reader(split, store, verify, keep), source


def open_reader(split: Split, access: str, verify: Any, keep: int) -> ChunkReader:
    """access: mmap or pread for our codecs.

    Library goes through zarr-python, whatever the codecs.
    """
    if access == "library":
        from warehouse.read.zarr_python import LibraryReader

        return LibraryReader(split, verify=verify, keep=keep)
    return split.reader(access=access, verify=verify, keep=keep)  # type: ignore[arg-type]
