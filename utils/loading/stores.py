"""The choice of a store: mapped files, reads, memory, a stream of chunks, or zarr-python.

Purpose: `choose_store` decides once, and returns a `ReadPlan` that opening follows.
Used by: features.finetuning.run_finetuning, segmentation.training, utils.caching.cached_passes,
  utils.loader, utils.loading.engines, utils.loading.sources
Design notes: "auto" goes by decoded size against the memory that is free (also under a cgroup's
  limit), by codecs, by where the version lies, and by the size of its files. Which arrays only
  zarr-python can read is looked up here, once: it reads a zarr.json for each array, which costs a
  request each on an object store.
Assistant guidance: when extending: a new store is a branch in `choose_store` and one in
  utils.loading.sources; none may change what is delivered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import psutil

from utils.loading.batch_sampler import BatchSampler
from utils.loading.settings import Store
from warehouse.errors import ConfigError
from warehouse.format.location import Remote
from warehouse.read.memory import split_bytes
from warehouse.read.version import Split

__all__ = [
    "Access",
    "ReadPlan",
    "bounded_memory_store",
    "choose_store",
    "file_system",
    "free_memory",
]

ChosenStore = Literal["mmap", "pread", "memory", "stream", "library"]
Access = Literal["mmap", "pread", "library"]

# Here a page fault costs a round trip: whole chunks are read ahead instead.
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


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How the arrays of a split will be read.

    Parameters
    ----------
    store
        The store that was chosen.
    reason
        Why, in half a sentence for the log.
    zarr_python_only
        Arrays that only zarr-python can read, each with the reason.
    """

    store: ChosenStore
    reason: str
    zarr_python_only: Mapping[str, str] = field(default_factory=dict)

    @property
    def access(self) -> Access:
        """How files are opened, also those that are decoded into memory first."""
        if self.zarr_python_only or self.store == "library":
            return "library"
        return "mmap" if self.store == "mmap" else "pread"


def choose_store(
    store: Store,
    split: Split,
    names: Sequence[str],
    sampler: BatchSampler,
    *,
    available: int | None = None,
    kind: str | None = None,
) -> ReadPlan:
    """Decide how a split is read: settle "auto", and check any other choice.

    Parameters
    ----------
    store
        The store that was asked for.
    split
        The split to read.
    names
        The arrays to read.
    sampler
        The sampler, which may or may not keep to stored chunks.
    available
        Free memory in bytes; measured when None.
    kind
        The type of the file system that the version lies on; looked up when None.

    Returns
    -------
    ReadPlan
        The decision and its reason.

    Raises
    ------
    ConfigError
        If the store cannot read this split in this order.
    """
    # Checked for any choice: a store that cannot work would fail in a worker, in the first epoch.
    decoded = split_bytes(split.source, names)
    available = free_memory() if available is None else available
    _refuse_impossible(store, split, decoded, sampler.by_chunk, available)

    if store == "library":
        return ReadPlan("library", "as asked for")

    foreign = split.foreign(names)
    if store == "memory":
        return ReadPlan("memory", "as asked for", foreign)
    if store != "auto":
        _refuse_foreign(store, split, foreign)
        return ReadPlan(store, "as asked for")

    if decoded <= available / 8:
        reason = (
            f"the decoded split ({decoded / 1e6:.0f} MB) takes less than an eighth "
            "of the free memory"
        )
        return ReadPlan("memory", reason, foreign)
    for name, why in foreign.items():
        return ReadPlan("library", f"only zarr-python can read array {name!r}: {why}", foreign)
    return _by_location(split, names, sampler.by_chunk, available, kind)


def _refuse_impossible(
    store: Store, split: Split, decoded: int, by_chunk: bool, available: int
) -> None:
    if store not in get_args(Store):
        raise ConfigError("unknown store", expected=", ".join(get_args(Store)), found=repr(store))
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
    if store in {"mmap", "pread"} and isinstance(split.warehouse.store, Remote):
        raise ConfigError(
            f"store={store!r} reads local files",
            where=split.warehouse.store,
            expected="stream, memory, library or auto",
            found=store,
            remedy="use --loader.store auto",
        )


def _refuse_foreign(store: str, split: Split, foreign: Mapping[str, str]) -> None:
    for name, why in foreign.items():
        raise ConfigError(
            f"store={store!r} cannot read array {name!r}: {why}",
            where=repr(split),
            expected="library, memory or auto",
            found=store,
            remedy="use --loader.store auto",
        )


def _by_location(
    split: Split, names: Sequence[str], by_chunk: bool, available: int, kind: str | None
) -> ReadPlan:
    """Choose for a split that is too large to decode into memory.

    It goes by where the version lies and by the size of its files.
    """
    location = split.warehouse.store
    if isinstance(location, Remote):
        where = f"the warehouse lies in an object store ({location})"
        if by_chunk:
            return ReadPlan("stream", f"{where}: stored chunks are fetched whole")
        return ReadPlan("library", f"{where}, RandomBatchSampler takes from any chunk at any time")

    # realpath: a link on a local disk may lead to a network mount.
    kind = file_system(os.path.realpath(location)) if kind is None else kind
    if kind in NETWORK_FILE_SYSTEMS:
        return ReadPlan("stream" if by_chunk else "pread", f"the warehouse lies on {kind}")

    # Mapped files that exceed the page cache would be read from disk again and again.
    stored = sum(int(split.warehouse.files(f"{split.group}/{name}")[0].sum()) for name in names)
    files = f"the files ({stored / 1e6:.0f} MB)"
    if stored > available and by_chunk:
        return ReadPlan("stream", f"{files} are larger than the page cache can become")
    return ReadPlan("mmap", f"{files} are local and fit the page cache")


def bounded_memory_store(split: Split, names: Sequence[str]) -> Access | Literal["stream"]:
    """Choose a store that holds only a few stored chunks at a time, neither decoded nor mapped.

    It is for a run whose memory is limited: mapped pages count as the process's own.
    """
    if split.foreign(names):
        return "library"
    return "stream" if isinstance(split.warehouse.store, Remote) else "pread"


def free_memory() -> int:
    """Return the bytes that can be taken without swapping.

    It is the machine's free memory, or what the cgroup leaves where that is less.
    """
    free = int(psutil.virtual_memory().available)
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            # cgroup v2; psutil knows only the machine, which a container may use but a part of.
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
    """Return the type of the file system that `path` lies on, from /proc/mounts.

    It is "unknown" where that cannot be read.
    """
    try:
        with open("/proc/mounts", encoding="utf-8") as mounts:
            lines = [line.split() for line in mounts]
    except OSError:
        return "unknown"
    # The longest mount point wins, since mounts lie within mounts.
    inside = (
        line for line in lines if path == line[1] or path.startswith(line[1].rstrip("/") + "/")
    )
    best = max(inside, key=lambda line: len(line[1]), default=None)
    return best[2] if best else "unknown"
