"""Reading the stored chunks of a split through our own decoder, checked, by any number of threads.

A reader gets a `SplitSource`: what it must know of a split, and nothing of manifests or layouts.
Invariant: a file's size and seal are compared with files.parquet when it is opened, and a sample's
crc32c before it is first decoded (`verify`: always, first_touch, off).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import CorruptError
from warehouse.format.location import Location
from warehouse.format.schema import ArraySpec
from warehouse.format.stored_chunk import StoredChunk
from warehouse.layouts.base import Origins, SampleIndex
from warehouse.read.files import Access, SizesAndSeals, VersionFiles, open_stored

__all__ = ["Access", "ChunkReader", "SplitSource", "Verify"]

Verify = Literal["first_touch", "always", "off"]
Plan = TypeVar("Plan")


@dataclass(frozen=True, kw_only=True)
class SplitSource:
    """What a reader must know of a split.

    Attributes
    ----------
    files
        The published files of the version.
    name
        Name of the split.
    group
        The Zarr group that its arrays lie in.
    specs
        Its arrays by name, as readers see them: [sample, ...].
    stored_specs
        The Zarr arrays that hold them.
    sample_index
        Where its samples lie.
    samples, chunks
        Samples of the split, and stored chunks that hold any.
    origins
        Where samples lie in the Zarr array, if they are regions of it; None where sample i is row i.
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
        """Where the version lies."""
        return self.files.location

    @property
    def chunk_sizes(self) -> list[int]:
        """Samples in each stored chunk."""
        return self.sample_index.chunk_sizes

    def where(self, name: str) -> str:
        """An array, as errors name it."""
        return f"{self.files.store}/{self.group}/{name}"


class ChunkReader:
    """Checked access to a split's files for any number of threads.

    Parameters
    ----------
    split
        The split to read.
    access
        How local files are read: through a memory map, or with `pread`.
    verify
        When a sample's checksum is compared: before it is first decoded, always, or never.
    keep
        Files that are kept open; the one that was not used for longest is closed first.
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
        """Decode samples, each once and straight into its row.

        Parameters
        ----------
        names
            The arrays to read.
        indices
            Sample numbers within the split, int64 [n].
        out
            Where they go: arrays [n, ...] by name.

        Returns
        -------
        tuple of int
            (samples decoded, bytes read).

        Raises
        ------
        CorruptError
            If a file is damaged; the message names it.
        """
        chunks, rows = self.split.sample_index.locate(indices)
        size = 0
        for chunk in np.unique(chunks).tolist():
            at = np.flatnonzero(chunks == chunk)
            for name in names:
                if self.split.specs[name].inner is None:
                    out[name][at] = self.small(name, chunk)[rows[at]]
                else:
                    size += self.read_rows(name, chunk, rows[at], out[name], at)
        return len(indices), size

    def follow(self, plans: Iterator[Plan]) -> Iterator[Plan]:
        """Hand on the batch plans of an epoch; readers that fetch ahead look at them here."""
        return plans

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        """The open file of a stored chunk, whose size is checked now.

        Raises CorruptError, which names the file.
        """
        key = (name, chunk)
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
            else:
                opening = self._opening.setdefault(key, threading.Lock())
        if found is not None:
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
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)
        return found

    def locate(
        self, name: str, chunk: int
    ) -> tuple[Location, int | NDArray[np.int64], tuple[int, int]]:
        """(file, its rows, (size, seal)) of a stored chunk of the split.

        Raises CorruptError when the table of files does not know it.
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
        """Open a stored chunk's file, without keeping it."""
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
        """Decode samples, by their positions in the chunk, of a sharded array into out[at].

        Returns the number of bytes read.
        """
        return self.chunk(name, chunk).read_rows(
            rows.tolist(), out, at.tolist(), verify=self.verify
        )

    def small(self, name: str, chunk: int) -> NDArray[Any]:
        """A plain array's whole stored chunk, [rows, ...]; do not write into it.

        It is kept while its file is among the open ones.
        """
        return self.chunk(name, chunk).read_all()

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._open.clear()
