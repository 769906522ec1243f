"""Readers anybody could write in an afternoon: live JPEG decode, zarr-python, np.memmap,
tensordict, TensorStore, xbatcher.

Each with its best sensible settings: whole batches fetched at once where the library can,
persistent spawned workers, and for chunked stores the same order by stored chunk that our loader
uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.data import Jpegs, Work, epoch_batches

__all__ = [
    "JpegReader",
    "MemmapReader",
    "TensorDictReader",
    "TensorStoreReader",
    "XbatcherReader",
    "ZarrChunkReader",
    "ZarrSampleReader",
    "write_tensordict",
]

AHEAD = 3


class BatchRows:
    """The `sampler` of a DataLoader without batching of its own.

    Index batches of the epoch set last.
    """

    def __init__(self, work: Work, chunk: int) -> None:
        settings = work.settings
        self.of = (settings.samples, settings.batch_size, chunk, settings.shuffle)
        self.number = 0

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.tolist() for batch in epoch_batches(*self.of, self.number))

    def __len__(self) -> int:
        return len(epoch_batches(*self.of, self.number))


def spawned(dataset: Any, rows: BatchRows | None, workers: int) -> Any:
    """A torch DataLoader whose items are whole batches."""
    options: dict[str, Any] = (
        {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    )
    return DataLoader(dataset, batch_size=None, sampler=rows, num_workers=workers, **options)


class _Batched:
    """An epoch over `self.loader`, its order set by `self.rows`."""

    rows: BatchRows
    loader: Any

    def epoch(self, number: int) -> Iterator[Any]:
        self.rows.number = number
        yield from self.loader

    def close(self) -> None:
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()


class _JpegBatches:
    def __init__(self, work: Work) -> None:
        self.jpegs = Jpegs(work)

    def __getitem__(self, rows: list[int]) -> Any:
        return torch.from_numpy(np.stack([self.jpegs[row] for row in rows]))


class JpegReader(_Batched):
    """Decode and letterbox in the loader, every epoch again."""

    def __init__(self, work: Work, workers: int) -> None:
        self.rows = BatchRows(work, work.settings.samples)
        self.loader = spawned(_JpegBatches(work), self.rows, workers)


class _MemmapBatches:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.pixels: NDArray[np.uint8] | None = None

    def __getitem__(self, rows: list[int]) -> Any:
        if self.pixels is None:
            self.pixels = np.asarray(np.load(self.path, mmap_mode="r"))
        return torch.from_numpy(np.take(self.pixels, rows, axis=0))


class MemmapReader(_Batched):
    """Uncompressed np.memmap, one take a batch, fully random order."""

    def __init__(self, work: Work, workers: int) -> None:
        self.rows = BatchRows(work, work.settings.samples)
        self.loader = spawned(
            _MemmapBatches(work.path("pixels") / "pixels.npy"), self.rows, workers
        )


class _ZarrSamples:
    def __init__(self, work: Work) -> None:
        self.split = work.split("lz4")
        self.array: Any = None

    def __getitem__(self, rows: list[int]) -> Any:
        if self.array is None:
            self.array = self.split.array("image")
        out = np.empty((len(rows), *self.array.shape[1:]), np.uint8)
        for at, row in enumerate(rows):
            out[at] = self.array[row]
        return torch.from_numpy(out)


class ZarrSampleReader(_Batched):
    """Our version read by zarr-python, a sample a read."""

    def __init__(self, work: Work, workers: int) -> None:
        self.rows = BatchRows(work, work.split("lz4").shard_samples)
        self.loader = spawned(_ZarrSamples(work), self.rows, workers)


class _ZarrChunks(IterableDataset[torch.Tensor]):
    """Batches of this worker's share of the stored chunks, each read whole."""

    def __init__(self, work: Work) -> None:
        self.split, self.settings, self.number = work.split("lz4"), work.settings, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        array, size, batch = (
            self.split.array("image"),
            self.split.shard_samples,
            self.settings.batch_size,
        )
        rng = np.random.default_rng(self.number)  # the same in every worker, which all count epochs
        self.number += 1
        info = get_worker_info()
        chunks = np.arange(-(-self.settings.samples // size))
        shares = rng.permutation(chunks) if self.settings.shuffle else chunks
        for chunk in shares[info.id :: info.num_workers] if info else shares:
            pixels = array[int(chunk) * size : (int(chunk) + 1) * size]
            rows = rng.permutation(len(pixels)) if self.settings.shuffle else np.arange(len(pixels))
            for start in range(0, len(rows), batch):
                yield torch.from_numpy(pixels[rows[start : start + batch]])


class ZarrChunkReader:
    """Our version read by zarr-python, a whole stored chunk a read.

    Many times faster than batches by index.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self.loader = spawned(_ZarrChunks(work), None, workers)

    def epoch(self, number: int) -> Iterator[Any]:
        yield from self.loader

    def close(self) -> None:
        pass


def write_tensordict(work: Work, target: Path, workers: int) -> None:
    from tensordict import MemoryMappedTensor, TensorDict

    target.mkdir()
    image = MemoryMappedTensor.empty(
        work.shape, dtype=torch.uint8, filename=str(target / "image.memmap")
    )
    data = TensorDict({"image": image}, batch_size=[work.settings.samples])
    jpegs = Jpegs(work)
    for at in range(len(jpegs)):
        image[at] = torch.from_numpy(jpegs[at])
    data.memmap_(str(target))


class TensorDictReader:
    """A memory-mapped TensorDict indexed by a tensor of random rows, on torch's threads."""

    def __init__(self, work: Work, workers: int) -> None:
        from tensordict import TensorDict

        self.data, self.work = TensorDict.load_memmap(str(work.path("tensordict"))), work

    def epoch(self, number: int) -> Iterator[Any]:
        settings = self.work.settings
        for rows in epoch_batches(
            settings.samples, settings.batch_size, settings.samples, settings.shuffle, number
        ):
            yield self.data[torch.from_numpy(rows)]["image"]

    def close(self) -> None:
        pass


class TensorStoreReader:
    """Our version through TensorStore's zarr3 driver, by stored chunk, written into reused buffers,
    two batches read ahead.
    """

    def __init__(self, work: Work, workers: int) -> None:
        import tensorstore as ts

        split = work.split("lz4")
        limits = {
            "data_copy_concurrency": {"limit": workers},
            "file_io_concurrency": {"limit": 32},
            "cache_pool": {"total_bytes_limit": 0},
        }
        store = {"driver": "file", "path": str(split.warehouse.store / "train" / "image")}
        # Published data never changes: looking at it once, when opened, is enough.
        once = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
        self.array = ts.open(
            {"driver": "zarr3", "kvstore": store} | once, context=ts.Context(limits), read=True
        ).result()
        self.ts, self.work, self.chunk = ts, work, split.shard_samples
        self.buffers = [
            np.zeros((work.settings.batch_size, *work.shape[1:]), np.uint8)
            for _ in range(AHEAD + 1)
        ]

    def epoch(self, number: int) -> Iterator[Any]:
        settings = self.work.settings
        batches = epoch_batches(
            settings.samples, settings.batch_size, self.chunk, settings.shuffle, number
        )
        waiting: list[tuple[Any, NDArray[np.uint8]]] = []
        for at, rows in enumerate(batches):
            out = self.buffers[at % (AHEAD + 1)][: len(rows)]
            waiting.append((self.ts.array(out).write(self.array[np.sort(rows)]), out))
            if len(waiting) == AHEAD:
                future, ready = waiting.pop(0)
                future.result()
                yield ready
        for future, ready in waiting:
            future.result()
            yield ready

    def close(self) -> None:
        pass


class XbatcherReader:
    """xbatcher over our version.

    It cuts neighbouring samples into batches and shuffles batches only.
    """

    def __init__(self, work: Work, workers: int) -> None:
        import xarray
        import xbatcher

        split = work.split("lz4")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = xarray.open_zarr(
                split.warehouse.store, group="train", chunks=None, mask_and_scale=False
            )["image"]
        self.work = work
        # `sample` is a name of its own to xbatcher, and dimensions it is not told of are stacked.
        data = data.rename(sample="picture")
        sizes = dict(zip(data.dims, (work.settings.batch_size, *data.shape[1:]), strict=True))
        self.cuts = xbatcher.BatchGenerator(data, sizes, preload_batch=False)
        # It drops a last, short batch; the rest is read as it would be by hand.
        self.rest = data[len(self.cuts) * work.settings.batch_size :]

    def epoch(self, number: int) -> Iterator[Any]:
        order = np.arange(len(self.cuts))
        if self.work.settings.shuffle:
            order = np.random.default_rng(number).permutation(order)
        for cut in order.tolist():
            yield np.ascontiguousarray(self.cuts[cut].values)
        if len(self.rest):
            yield self.rest.values

    def close(self) -> None:
        pass
