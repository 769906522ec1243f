"""What the machine can do at all: decode every sample, or copy every row, with nothing around it.

Written apart from the loader's own reading: the shard files are parsed here, in twenty lines, and
decoded by numcodecs, so that a fault in one does not hide in the other. Each thread owns one batch
buffer and a fixed share of the batches; nothing is handed over, so there is no queue to pay for.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from benchmarks.data import Work, epoch_batches

__all__ = ["DecodeLimit", "TakeLimit", "inner_chunks"]

ORDERS = 4


def inner_chunks(store: Path, array: str) -> tuple[list[memoryview], int]:
    """Encoded inner chunks with their crc32c, in sample order, and the samples of a stored chunk.

    The array is sharded along its samples.
    """
    meta = json.loads((store / array / "zarr.json").read_text())
    samples, size = meta["shape"][0], meta["chunk_grid"]["configuration"]["chunk_shape"][0]
    out: list[memoryview] = []
    for chunk in range(-(-samples // size)):
        path = store / array / "c" / str(chunk) / "/".join("0" * (len(meta["shape"]) - 1))
        with open(path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        index = np.frombuffer(view[-16 * size - 4 : -4], "<u8").reshape(size, 2)[
            : samples - chunk * size
        ]
        out += [view[offset : offset + length] for offset, length in index.tolist()]
    return out, size


class _Threads:
    """Runs `fill(indices, buffer)` over an epoch's batches on `threads` threads, each with its own
    buffer.
    """

    def __init__(
        self,
        work: Work,
        threads: int,
        chunk: int,
        fill: Callable[[NDArray[np.int64], NDArray[np.uint8]], None],
    ) -> None:
        self.threads, self.fill = threads, fill
        settings = work.settings
        # Orders are ready before the clock starts: computing one is no part of a limit.
        self.orders = [
            epoch_batches(settings.samples, settings.batch_size, chunk, settings.shuffle, epoch)
            for epoch in range(ORDERS)
        ]
        self.buffers = [
            np.zeros((work.settings.batch_size, *work.shape[1:]), np.uint8) for _ in range(threads)
        ]

    def run(self, number: int) -> int:
        """One epoch with nobody receiving; samples."""
        batches = self.orders[number % ORDERS]

        def work(at: int) -> None:
            for indices in batches[at :: self.threads]:
                self.fill(indices, self.buffers[at][: len(indices)])

        threads = [threading.Thread(target=work, args=(at,)) for at in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(map(len, batches))

    def epoch(self, number: int) -> Iterator[Any]:
        for indices in self.orders[number % ORDERS]:
            out = self.buffers[0][: len(indices)]
            self.fill(indices, out)
            yield out

    def close(self) -> None:
        pass


class DecodeLimit(_Threads):
    """Pure LZ4 decode of every sample into reused batch buffers.

    With `check` also each inner chunk's crc32c.
    """

    def __init__(self, work: Work, workers: int, *, check: bool = False) -> None:
        from numcodecs import blosc

        blosc.use_threads = False
        version = json.loads(
            (
                work.path("lz4")
                / (work.path("lz4") / "CURRENT").read_text().strip()
                / "manifest.json"
            ).read_text()
        )["version"]
        encoded, chunk = inner_chunks(work.path("lz4") / version / "warehouse.zarr", "train/image")
        bodies = [view[:-4] for view in encoded]
        sums = [int.from_bytes(view[-4:], "little") for view in encoded]

        def fill(indices: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
            for row, sample in zip(out, indices.tolist(), strict=True):
                if check and crc32c(bodies[sample]) != sums[sample]:
                    raise ValueError(f"sample {sample} fails its crc32c")
                blosc.decompress(bodies[sample], row)

        super().__init__(work, len(os.sched_getaffinity(0)), chunk, fill)


class TakeLimit(_Threads):
    """Uncompressed rows copied out of the page cache by numpy's take, in fully random order.

    `threads` of them at once.
    """

    def __init__(self, work: Work, workers: int, *, threads: int = 1) -> None:
        pixels = np.asarray(work.pixels)

        def fill(indices: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
            # mode="raise" would copy through a temporary.
            np.take(pixels, indices, axis=0, out=out, mode="clip")

        super().__init__(work, threads, len(pixels), fill)
