"""Read the stored chunks of a split with the project's own decoder, from any number of threads.

A reader is given a `SplitSource`, which holds what it must know of a split, and knows nothing of
manifests and layouts. Invariant: the size and the seal of a file are compared with files.parquet
when the file is opened, and the crc32c of a sample before it is decoded, as often as `verify` asks
for. What was given up: arrays with codecs of others, which `warehouse.read.zarr_python` reads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import CorruptError
from warehouse.format.location import Location
from warehouse.format.schema import ArraySpec
from warehouse.format.stored_chunk import StoredChunk
from warehouse.layouts.base import Origins, SampleIndex
from warehouse.read.version_files import Access, SizesAndSeals, VersionFiles, open_stored

__all__ = ["Access", "ChunkReader", "Plan", "PlannedBatch", "SplitSource", "Verify"]

Verify = Literal["first_touch", "always", "off"]


class PlannedBatch(Protocol):
    """What a reader must know of a batch that is going to be filled."""

    @property
    def indices(self) -> NDArray[np.int64]:
        """The samples of the batch, int64 ``[n]``."""


Plan = TypeVar("Plan", bound=PlannedBatch)


@dataclass(frozen=True, kw_only=True)
class SplitSource:
    """What a reader must know of a split.

    Attributes
    ----------
    files
        The published files of the version.
    name
        The name of the split.
    group
        The Zarr group that its arrays lie in.
    specs
        Its arrays by name, as readers see them: ``[sample, ...]``.
    stored_specs
        The Zarr arrays that hold them.
    sample_index
        Which stored chunk and row each sample is in.
    samples
        The number of samples of the split.
    chunks
        The number of stored chunks that hold any of them.
    origins
        Return where samples begin in the Zarr array, if they are regions of it. None where sample i
        is row i.
    """

    files: VersionFiles
    name: str
    group: str
    specs: Mapping[str, ArraySpec]
    stored_specs: Mapping[str, ArraySpec]
    sample_index: SampleIndex
    samples: int
    chunks: int
    origins: Origins | None = None

    def __len__(self) -> int:
        return self.samples

    @property
    def location(self) -> Location:
        """Return the folder of the version, or its prefix in an object store."""
        return self.files.location

    @property
    def chunk_sizes(self) -> list[int]:
        """Return the number of samples in each stored chunk."""
        return self.sample_index.chunk_sizes

    def where(self, name: str) -> str:
        """Return how errors name an array."""
        return f"{self.files.store}/{self.group}/{name}"


class ChunkReader:
    """Read samples of a split, checked, from any number of threads.

    Parameters
    ----------
    split
        The split to read.
    access
        How local files are read: through a memory map, or with `pread`.
    verify
        When the checksum of a sample is compared: before it is first decoded, always, or never.
    keep
        The number of files that are kept open. The file that was not used for the longest time is
        closed first.

    Notes
    -----
    `follow`, `done` and `raise_fetch_error` do nothing here. A reader that fetches ahead, or
    decodes a whole split at once, overrides them, so that the engines of the loader treat all
    readers alike.
    """

    def __init__(self, split: SplitSource, *, access: Access, verify: Verify, keep: int) -> None:
        self.split, self.access, self.verify, self.keep = split, access, verify, keep
        self._open: OrderedDict[tuple[str, int], StoredChunk] = OrderedDict()
        self._expected: dict[str, SizesAndSeals] = {}
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, int], threading.Lock] = {}
        self.chunks_opened = 0

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Decode samples, each of them once and directly into its row.

        Parameters
        ----------
        names
            The arrays to read.
        indices
            Sample numbers within the split, int64 ``[n]``, in any order.
        out
            The arrays to fill, ``[n, ...]`` by name.

        Returns
        -------
        tuple of int
            The number of samples decoded, and the number of bytes read.

        Raises
        ------
        CorruptError
            If a file is damaged; the message names it.
        """
        chunks, rows = self.split.sample_index.locate(indices)
        bytes_read = 0

        # Chunk by chunk, not sample by sample: a file is looked up once a batch, under a lock that
        # all decoding threads share.
        for chunk in np.unique(chunks).tolist():
            at = np.flatnonzero(chunks == chunk)
            for name in names:
                if self.split.specs[name].inner is None:
                    out[name][at] = self.small(name, chunk)[rows[at]]
                else:
                    bytes_read += self.read_rows(name, chunk, rows[at], out[name], at)

        return len(indices), bytes_read

    def follow(self, plans: Iterator[Plan]) -> Iterator[Plan]:
        """Return the batch plans of an epoch. Readers that fetch ahead look at them here."""
        return plans

    def done(self, indices: NDArray[np.int64]) -> None:
        """Give back what was fetched for a batch that another process has filled.

        Parameters
        ----------
        indices
            The samples of the batch, int64 ``[n]``.
        """

    def raise_fetch_error(self, indices: NDArray[np.int64]) -> None:
        """Raise the error that fetching a chunk of a batch ended with, if it ended with one.

        Parameters
        ----------
        indices
            The samples of the batch, int64 ``[n]``.
        """

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        """Return the open file of a stored chunk, whose size is compared at each call.

        Raises
        ------
        CorruptError
            If the file is damaged; the message names it.
        """
        key = (name, chunk)
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
            else:
                opening = self._opening.setdefault(key, threading.Lock())

        if found is not None:
            # A mapped file that was cut short since would end the process with SIGBUS.
            found.check_size()
            return found

        # Neighbouring batches share a chunk, so that all threads come to a new one at once: the
        # first opens it, the others wait.
        with opening:
            with self._lock:
                found = self._open.get(key)
            if found is not None:
                return found

            found = self.open_chunk(name, chunk)
            with self._lock:
                self._open[key] = found
                self._opening.pop(key, None)
                self.chunks_opened += 1
                # Dropped, not closed: another thread may be decoding from it. Its map is released
                # with the last reference.
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)

        return found

    def locate(
        self, name: str, chunk: int
    ) -> tuple[Location, int | NDArray[np.int64], tuple[int, int]]:
        """Return the file of a stored chunk, its rows, and the size and seal it must have.

        Raises
        ------
        CorruptError
            If the table of files has no row for the chunk.
        """
        split = self.split
        with self._lock:
            if name not in self._expected:
                self._expected[name] = split.files.sizes_and_seals(f"{split.group}/{name}")
            sizes, seals = self._expected[name]

        stored = split.sample_index.stored(chunk) if 0 <= chunk < split.chunks else len(sizes)
        if stored >= len(sizes):
            raise CorruptError(
                "a stored chunk is not in the table of files",
                where=f"{split.location}, {split.name}/{name}, chunk {chunk}",
            )

        path = split.files.chunk_path(split.group, split.specs[name], stored)
        rows = split.sample_index.present(chunk)
        return path, rows, (int(sizes[stored]), int(seals[stored]))

    def open_chunk(self, name: str, chunk: int) -> StoredChunk:
        """Open the file of a stored chunk without keeping it open."""
        path, rows, expected = self.locate(name, chunk)
        return open_stored(path, self.split.specs[name], rows, expected, self.access)

    def read_rows(
        self,
        name: str,
        chunk: int,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        at: NDArray[np.int64],
    ) -> int:
        """Decode samples of a sharded array from one stored chunk.

        Parameters
        ----------
        name
            The array.
        chunk
            The stored chunk, by its number in the split.
        rows
            The positions of the samples in the chunk, int64 ``[n]``.
        out
            The array to fill.
        at
            The rows of `out` that the samples go to, int64 ``[n]``.

        Returns
        -------
        int
            The number of bytes read.
        """
        return self.chunk(name, chunk).read_rows(
            rows.tolist(), out, at.tolist(), verify=self.verify
        )

    def small(self, name: str, chunk: int) -> NDArray[Any]:
        """Return the whole stored chunk of an array that is not sharded, ``[rows, ...]``.

        It is kept while its file is open and shared by all callers, who must not write into it.
        """
        return self.chunk(name, chunk).read_all()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._open.clear()
