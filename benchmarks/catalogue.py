"""Every row of the benchmark and every writer.

Names, groups, what they read, with which settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack

from benchmarks import limits, ours, peers, plain
from benchmarks.data import Work, run_build
from benchmarks.settings import BenchSettings

__all__ = ["WRITERS", "Reader", "Row", "catalogue"]


class Reader(Protocol):
    """What a row makes. `epoch(n)` yields uint8 [B, 3, H, W], arrays or tensors, every sample once.

    It may have `run(n) -> samples` (a limit, which hands nothing out), `renew()` (called outside
    the timing, before each epoch) and `facts()` (after the last one).
    """

    def epoch(self, number: int) -> Iterator[Any]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One reader or limit to measure.

    Attributes
    ----------
    name
        Unique among the rows.
    data
        The folder below the working folder that it reads.
    peer
        Its name in `bench.peers`; None for our own rows and limits.
    """

    name: str
    group: Literal["ours", "limit", "peer"]
    make: Callable[[Work, int], Reader]
    workers: int
    data: str
    note: str = ""
    peer: str | None = None


WRITERS: dict[str, Callable[..., float | None]] = {
    "tensordict": plain.write_tensordict,
    "webdataset": peers.write_webdataset,
    "litdata": peers.write_litdata,
    "mds": peers.write_mds,
    "ffcv": peers.write_ffcv,
}


def build_ours(work: Work, target: Path, workers: int, *, compressor: str = "lz4") -> float:
    return run_build(work, target, compressor=compressor, workers=workers)


def catalogue(settings: BenchSettings) -> list[Row]:
    """The rows that `settings` asks for, in the order they are shown."""
    workers = settings.workers
    rows = [*_limits(workers), *_ours(workers), *_peers(workers)]
    return [
        row
        for row in rows
        if settings.wants(row.peer)
        and (settings.rows is None or any(part in row.name for part in settings.rows))
    ]


def _limits(workers: int) -> list[Row]:
    return [
        Row(
            "lz4 decode",
            "limit",
            limits.DecodeLimit,
            0,
            "lz4",
            "every sample into reused batch buffers, a thread a core, no crc",
        ),
        Row(
            "lz4 decode + crc32c",
            "limit",
            partial(limits.DecodeLimit, check=True),
            0,
            "lz4",
            "the same, each inner chunk's crc32c checked",
        ),
        Row(
            "row take",
            "limit",
            limits.TakeLimit,
            0,
            "pixels",
            "np.take of uncompressed pages, random rows, one reused buffer, one thread",
        ),
        Row(
            "row take, threads",
            "limit",
            partial(limits.TakeLimit, threads=workers),
            workers,
            "pixels",
            "the same on several threads",
        ),
    ]


def _ours(workers: int) -> list[Row]:
    def row(
        name: str,
        note: str,
        *,
        count: int = workers,
        data: str = "lz4",
        **options: Unpack[ours.LoaderChoice],
    ) -> Row:
        return Row(
            name, "ours", partial(ours.LoaderReader, dataset=data, **options), count, data, note
        )

    return [
        row(
            "thread",
            "mmap; crc32c at first touch, so none in the timed epochs",
            engine="thread",
            store="mmap",
        ),
        row("spawn", "mmap", engine="spawn", store="mmap"),
        row("inline", "mmap", count=0, engine="inline", store="mmap"),
        row(
            "thread, verify=always",
            "crc32c of every sample in every epoch",
            verify="always",
            engine="thread",
            store="mmap",
        ),
        row(
            "thread, first epoch",
            "a new loader each epoch: every crc32c, new buffers",
            fresh=True,
            engine="thread",
            store="mmap",
        ),
        row(
            "spawn, verify=always",
            "crc32c of every sample in every epoch",
            verify="always",
            engine="spawn",
            store="mmap",
        ),
        row(
            "thread, all arrays",
            "boxes, masks, labels and geometry as well",
            arrays=None,
            engine="thread",
            store="mmap",
        ),
        row("thread, pread", "scratch buffer a thread", engine="thread", store="pread"),
        row("thread, memory", "decoded once, batches by row take", engine="thread", store="memory"),
        row("thread, stream", "stored chunks fetched whole", engine="thread", store="stream"),
        row("spawn, stream", "stored chunks fetched whole", engine="spawn", store="stream"),
        row("thread, compressor=none", "mmap", data="none", engine="thread", store="mmap"),
        row("spawn, compressor=none", "mmap", data="none", engine="spawn", store="mmap"),
    ]


def _peers(workers: int) -> list[Row]:
    def row(
        name: str,
        peer: str,
        make: Any,
        data: str,
        note: str,
        *,
        counts: tuple[int, ...] = (workers,),
    ) -> list[Row]:
        return [
            Row(
                f"{name}, {count} workers" if len(counts) > 1 else name,
                "peer",
                make,
                count,
                data,
                note,
                peer,
            )
            for count in counts
        ]

    both = (0, workers)
    spawn_note = "spawned DataLoader, whole batches, persistent"
    return [
        *row(
            "JPEG decode",
            "jpeg",
            plain.JpegReader,
            "jpegs",
            f"decode + letterbox; {spawn_note}",
            counts=both,
        ),
        *row(
            "zarr-python, a sample a read",
            "zarr",
            plain.ZarrSampleReader,
            "lz4",
            "in this process",
            counts=(0,),
        ),
        *row(
            "zarr-python, a chunk a read",
            "zarr",
            plain.ZarrChunkReader,
            "lz4",
            f"stored chunks whole; {spawn_note}",
            counts=both,
        ),
        *row(
            "np.memmap",
            "memmap",
            plain.MemmapReader,
            "pixels",
            f"one take a batch, random rows; {spawn_note}",
            counts=both,
        ),
        *row(
            "tensordict memmap",
            "tensordict",
            plain.TensorDictReader,
            "tensordict",
            "indexed by random rows, torch's threads",
            counts=(0,),
        ),
        *row(
            "TensorStore",
            "tensorstore",
            plain.TensorStoreReader,
            "lz4",
            "zarr3 driver, by stored chunk, into reused buffers, two ahead",
        ),
        *row(
            "xbatcher",
            "xbatcher",
            plain.XbatcherReader,
            "lz4",
            "neighbouring samples, batches shuffled",
            counts=(0,),
        ),
        *row(
            "WebDataset",
            "webdataset",
            peers.WebDatasetReader,
            "webdataset",
            "raw bytes in tars of 128, shuffle buffer 256",
            counts=both,
        ),
        *row(
            "LitData",
            "litdata",
            peers.LitDataReader,
            "litdata",
            "raw tensors, 64 MB chunks, shuffled",
            counts=both,
        ),
        *row(
            "MosaicML Streaming",
            "mds",
            peers.MdsReader,
            "mds",
            "raw ndarrays, 64 MB shards, shuffled",
            counts=both,
        ),
        *row(
            "FFCV",
            "ffcv",
            peers.FfcvReader,
            "ffcv",
            "raw NDArrayField, random order, page cache, reused buffers",
        ),
    ]
