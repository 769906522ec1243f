"""Libraries with a dataset format of their own: WebDataset, LitData, MosaicML Streaming (MDS),
FFCV. A writer and a reader each.

All store the decoded pixels uncompressed, which reads fastest in each, and write from the same
JPEGs with the same decoder and filter. Imports are made where they are needed: a peer that is not
installed is a row that says so.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Jpegs, Work

__all__ = [
    "FfcvReader",
    "LitDataReader",
    "MdsReader",
    "WebDatasetReader",
    "write_ffcv",
    "write_litdata",
    "write_mds",
    "write_webdataset",
]

TAR_SAMPLES = 128
CHUNK_BYTES = "64MB"


def ranges(count: int, parts: int) -> list[range]:
    """`count` items cut into `parts` neighbouring ranges."""
    ends = [count * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


def in_processes(job: Callable[[int, range], None], count: int, workers: int) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(job, range(workers), ranges(count, workers)))


def write_webdataset(work: Work, target: Path, workers: int) -> None:
    target.mkdir()
    in_processes(partial(_write_tars, Jpegs(work), target), work.settings.samples, workers)


def _write_tars(jpegs: Jpegs, target: Path, part: int, rows: range) -> None:
    import webdataset

    per_tar = max(1, min(TAR_SAMPLES, len(jpegs) // 8))
    with webdataset.ShardWriter(
        str(target / f"{part}-%05d.tar"), maxcount=per_tar, verbose=0
    ) as sink:
        for row in rows:
            sink.write({"__key__": f"{row:08d}", "u8": jpegs[row].tobytes()})


class _FromBytes:
    """Raw bytes of a sample -> uint8 [3, H, W]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, sample: tuple[bytes]) -> Any:
        return np.frombuffer(sample[0], np.uint8).reshape(self.shape)


def _stack(rows: list[Any]) -> Any:
    import torch

    return torch.from_numpy(np.stack(rows))


class WebDatasetReader:
    """Tars shuffled, then samples within a buffer of 256; batches are stacked in the worker."""

    def __init__(self, work: Work, workers: int) -> None:
        import webdataset

        settings = work.settings
        urls = [str(path) for path in work.files("webdataset")]
        data = webdataset.WebDataset(
            urls, shardshuffle=len(urls) if settings.shuffle else False, seed=0, empty_check=False
        )
        if settings.shuffle:
            data = data.shuffle(256)
        data = (
            data.to_tuple("u8")
            .map(_FromBytes(work.shape[1:]))
            .batched(settings.batch_size, collation_fn=_stack, partial=True)
        )
        self.loader = webdataset.WebLoader(
            data, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )

    def epoch(self, number: int) -> Iterator[Any]:
        yield from self.loader

    def close(self) -> None:
        pass


def write_litdata(work: Work, target: Path, workers: int) -> None:
    import litdata

    litdata.optimize(
        partial(_tensor, Jpegs(work)),
        list(range(work.settings.samples)),
        str(target),
        chunk_bytes=CHUNK_BYTES,
        num_workers=workers,
        reorder_files=False,
        mode="overwrite",
        start_method="spawn",
        verbose=False,
    )


def _tensor(jpegs: Jpegs, row: int) -> Any:
    import torch

    return torch.from_numpy(jpegs[row])


class LitDataReader:
    """StreamingDataset and StreamingDataLoader on a local folder, shuffled, uncompressed tensors,
    64 MB chunks.
    """

    def __init__(self, work: Work, workers: int) -> None:
        import litdata

        settings = work.settings
        data = litdata.StreamingDataset(
            str(work.path("litdata")), shuffle=settings.shuffle, drop_last=False
        )
        self.loader = litdata.StreamingDataLoader(
            data,
            batch_size=settings.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            drop_last=False,
        )

    def epoch(self, number: int) -> Iterator[Any]:
        yield from self.loader

    def close(self) -> None:
        pass


def _import_streaming() -> Any:
    """MosaicML Streaming.

    Its `vision` module, unused here, wants torchvision at import: a stand-in where there is none.
    """
    try:
        import torchvision  # noqa: F401
    except Exception:
        names = (
            "torchvision",
            "torchvision.datasets",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
        made = {name: types.ModuleType(name) for name in names}
        for name, module in made.items():
            module.__spec__ = ModuleSpec(name, None)
        made["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        made["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        sys.modules.update(made)
    import streaming

    return streaming


def write_mds(work: Work, target: Path, workers: int) -> None:
    streaming = _import_streaming()

    target.mkdir()
    in_processes(partial(_write_mds_part, Jpegs(work), target), work.settings.samples, workers)
    streaming.base.util.merge_index(str(target), keep_local=True)


def _write_mds_part(jpegs: Jpegs, target: Path, part: int, rows: range) -> None:
    streaming = _import_streaming()
    columns = {"image": "ndarray:uint8:" + ",".join(map(str, (3, *jpegs.size)))}
    with streaming.MDSWriter(
        out=str(target / str(part)), columns=columns, compression=None, size_limit=64 << 20
    ) as sink:
        for row in rows:
            sink.write({"image": jpegs[row]})


def _collate_mds(samples: list[dict[str, Any]]) -> Any:
    return _stack([sample["image"] for sample in samples])


class MdsReader:
    """StreamingDataset on a local folder, shuffled (py1e), in a plain DataLoader."""

    def __init__(self, work: Work, workers: int) -> None:
        streaming = _import_streaming()
        from torch.utils.data import DataLoader

        settings = work.settings
        streaming.base.util.clean_stale_shared_memory()
        data = streaming.StreamingDataset(
            local=str(work.path("mds")), shuffle=settings.shuffle, batch_size=settings.batch_size
        )
        self.loader = DataLoader(
            data,
            batch_size=settings.batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate_mds,
        )

    def epoch(self, number: int) -> Iterator[Any]:
        yield from self.loader

    def close(self) -> None:
        pass


class _Items:
    """FFCV's writer wants tuples; its memory copy wants writable, contiguous items."""

    def __init__(self, jpegs: Jpegs) -> None:
        self.jpegs = jpegs

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, row: int) -> tuple[Any]:
        return (self.jpegs[row],)


def write_ffcv(work: Work, target: Path, workers: int) -> None:
    from ffcv.fields import NDArrayField
    from ffcv.writer import DatasetWriter

    target.mkdir()
    fields = {"image": NDArrayField(np.dtype("uint8"), work.shape[1:])}
    DatasetWriter(str(target / "pixels.beton"), fields, num_workers=workers).from_indexed_dataset(
        _Items(Jpegs(work)), chunksize=max(1, min(64, work.settings.samples // (4 * workers)))
    )


class FfcvReader:
    """Uncompressed NDArrayField in random order from the page cache, copied by compiled threads
    into FFCV's own reused buffers.
    """

    def __init__(self, work: Work, workers: int) -> None:
        from ffcv.fields.ndarray import NDArrayDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import ToTensor

        settings = work.settings
        order = OrderOption.RANDOM if settings.shuffle else OrderOption.SEQUENTIAL
        self.loader = Loader(
            str(work.path("ffcv") / "pixels.beton"),
            batch_size=settings.batch_size,
            num_workers=workers,
            os_cache=True,
            order=order,
            seed=0,
            drop_last=False,
            batches_ahead=2,
            pipelines={"image": [NDArrayDecoder(), ToTensor()]},
        )

    def epoch(self, number: int) -> Iterator[Any]:
        for batch in self.loader:
            yield batch[0]

    def close(self) -> None:
        pass
