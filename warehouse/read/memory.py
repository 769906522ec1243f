"""`store: memory`: a split decoded once into one array each, batches by row take.

For splits that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.read.version import ChunkReader, Split

__all__ = ["MemoryReader", "decode_split", "split_bytes"]


def split_bytes(split: Split, names: Sequence[str]) -> int:
    """Bytes of the decoded arrays."""
    return sum(len(split) * split.specs[name].row_bytes for name in names)


def decode_split(
    reader: ChunkReader, names: Sequence[str], out: Mapping[str, NDArray[Any]], *, threads: int
) -> int:
    """Decode every sample of the reader's split into out[name] ([samples, ...]), chunk by chunk,
    and close it; bytes read.

    Raises CorruptError.
    """
    starts = reader.split.places.starts.tolist()

    def one(chunk: int) -> int:
        part = slice(starts[chunk], starts[chunk + 1])
        return reader.fill(
            names, np.arange(part.start, part.stop), {name: out[name][part] for name in names}
        )[1]

    with ThreadPoolExecutor(max(1, threads)) as pool:
        read = sum(pool.map(one, range(len(starts) - 1)))
    reader.close()
    return read


class MemoryReader(ChunkReader):
    """A split's decoded arrays, [samples, ...] each.

    `load` is called before the first batch, by whoever reads first.
    """

    def __init__(
        self,
        split: Split,
        arrays: Mapping[str, NDArray[Any]],
        load: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(split, access="mmap", verify="off", keep=1)
        self.arrays, self.load = arrays, load
        self.bytes_loaded = 0

    def follow(self, plans: Any) -> Any:
        if self.load is not None:
            self.bytes_loaded = self.load()
            self.load = None  # only now: what a failed load left behind must not be served
            self.chunks_opened = len(self.split.chunk_sizes)
        return plans

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Rows copied by one take an array; nothing is decoded again, so `decoded` counts rows
        copied out of the decoded split.

        The bytes of the load are counted with the first batch.
        """
        for name in names:
            # mode="raise" would buffer `out`; the indices come from the sampler and are in range.
            np.take(self.arrays[name], indices, axis=0, out=out[name], mode="clip")
        read, self.bytes_loaded = self.bytes_loaded, 0
        return len(indices), read
