"""Samples of a split as plain arrays in RAM: some of them, or the whole split decoded once.

Every part of the project that wants samples by number, other than a training loop, comes here:
`read_samples` allocates the arrays and fills them. `store: memory` decodes a split with
`decode_split` and serves batches from the result by copying rows (`MemoryReader`). What was given
up: a split that does not fit into RAM needs another store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.format.schema import ArraySpec
from warehouse.read.chunks import ChunkReader, Plan, SplitSource

__all__ = ["MemoryReader", "allocate_samples", "decode_split", "read_samples", "split_bytes"]


def split_bytes(split: SplitSource, names: Sequence[str]) -> int:
    """Return the size of the decoded arrays `names` of a split, in bytes."""
    return sum(len(split) * split.specs[name].row_bytes for name in names)


def allocate_samples(
    specs: Mapping[str, ArraySpec], names: Sequence[str], count: int
) -> dict[str, NDArray[Any]]:
    """Allocate one array of `count` samples for each name.

    Parameters
    ----------
    specs
        The specifications of a split's arrays.
    names
        The arrays to allocate.
    count
        The number of samples, the length of each array's first axis.

    Returns
    -------
    dict of str to ndarray
        Arrays ``[count, ...]`` of the stored types, not initialised.
    """
    return {name: np.empty((count, *specs[name].shape[1:]), specs[name].dtype) for name in names}


def read_samples(
    reader: ChunkReader, names: Sequence[str], indices: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    """Read samples by number into new arrays.

    Parameters
    ----------
    reader
        A reader of the split.
    names
        The arrays to read.
    indices
        Sample numbers within the split, int64 ``[n]``, in any order.

    Returns
    -------
    dict of str to ndarray
        Arrays ``[n, ...]`` of the stored types, in the order of `indices`.

    Raises
    ------
    CorruptError
        If a file is damaged; the message names it.

    Examples
    --------
    >>> boxes = read_samples(split.reader(), ["box"], np.arange(8))["box"]  # doctest: +SKIP
    """
    arrays = allocate_samples(reader.split.specs, names, len(indices))
    reader.fill(names, indices, arrays)
    return arrays


def decode_split(
    reader: ChunkReader, names: Sequence[str], out: Mapping[str, NDArray[Any]], *, threads: int
) -> int:
    """Decode every sample of the reader's split, one stored chunk a thread, and close the reader.

    Parameters
    ----------
    reader
        A reader of the split, safe for several threads.
    names
        The arrays to decode.
    out
        Where they go: arrays ``[samples, ...]`` by name.
    threads
        The number of chunks that are decoded at the same time.

    Returns
    -------
    int
        The number of bytes read.

    Raises
    ------
    CorruptError
        If a file is damaged; the message names it.
    """
    starts = reader.split.sample_index.starts.tolist()

    def decode_chunk(chunk: int) -> int:
        samples = slice(starts[chunk], starts[chunk + 1])
        indices = np.arange(samples.start, samples.stop)
        _, bytes_read = reader.fill(names, indices, {name: out[name][samples] for name in names})
        return bytes_read

    with ThreadPoolExecutor(max(1, threads)) as pool:
        bytes_read = sum(pool.map(decode_chunk, range(len(starts) - 1)))

    reader.close()
    return bytes_read


class MemoryReader(ChunkReader):
    """Serve batches from a decoded split by copying rows.

    Parameters
    ----------
    split
        The split that the arrays hold.
    arrays
        Its decoded arrays, ``[samples, ...]`` each.
    load
        Fills `arrays` and returns the number of bytes read. It is called once, before the first
        batch, by the process that reads the plans. None: the arrays are filled already.
    """

    def __init__(
        self,
        split: SplitSource,
        arrays: Mapping[str, NDArray[Any]],
        load: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(split, access="mmap", verify="off", keep=1)
        self.arrays, self.load = arrays, load
        self.bytes_loaded = 0

    def follow(self, plans: Iterator[Plan]) -> Iterator[Plan]:
        """Decode the split before its first batch is planned, and hand on the plans."""
        if self.load is not None:
            self.bytes_loaded = self.load()
            # Cleared only now: what a failed load left behind must not be served.
            self.load = None
            self.chunks_opened = len(self.split.chunk_sizes)
        return plans

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Copy the rows of a batch; return (rows copied, bytes read).

        Nothing is decoded again: the first number counts rows taken from the decoded split. The
        bytes of the load are counted with the first batch.
        """
        for name in names:
            # mode="raise" would buffer `out`; the indices come from the sampler and are in range.
            np.take(self.arrays[name], indices, axis=0, out=out[name], mode="clip")

        bytes_read, self.bytes_loaded = self.bytes_loaded, 0
        return len(indices), bytes_read
