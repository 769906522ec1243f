"""python -m benchmarks.tensor_cache [--items 200 --milliseconds 10 --workers 0 2 4 --repeats 3]

Epochs over a cached dataset whose transform costs about so much of a core: the first, which
computes, and the second, which reads. By `CachedLoader`, and by a plain `DataLoader` over the same
cache. Fixed work, not a fixed time, so that workers that share a core are not flattered. Workers
are forked, whose start costs least: spawned ones would make the first epoch, and so the ratio,
larger. The last line of stdout is the rows as JSON; the table goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from utils.caching.cached_loader import CachedLoader
from utils.caching.item_codec import encode_item
from utils.caching.tensor_cache import CachedDataset

__all__ = ["Pictures", "calibrated", "measure"]

SIDE, BATCH = 128, 16


class Pictures:
    """Text-detection-like items of about 200 KB that follow from their number; rounds.

    Of Fourier transforms each costs.
    """

    def __init__(self, items: int, rounds: int) -> None:
        self.items, self.rounds = items, rounds

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(index)
        field: NDArray[np.floating] = rng.random((3, SIDE, SIDE), dtype=np.float32)
        for _ in range(self.rounds):
            field = np.abs(np.fft.ifft2(np.fft.fft2(field) * 0.5)) + 0.25
        return {
            "image": torch.from_numpy(field.astype(np.float32)),
            "polygons": [
                rng.random((int(corners), 2), dtype=np.float32)
                for corners in rng.integers(3, 12, 5)
            ],
            "ignore": rng.random(5) < 0.5,
            "shape": (SIDE, SIDE),
            "source": f"{index}.jpg",
        }


def calibrated(milliseconds: float) -> int:
    """Rounds that take about so much time of this core."""

    def cost(rounds: int) -> float:
        start = time.process_time()
        for index in range(5):
            _ = Pictures(5, rounds)[index]
        return (time.process_time() - start) / 5

    cost(1)
    return max(1, round(milliseconds / 1e3 / ((cost(11) - cost(1)) / 10)))


def measure(kind: str, workers: int, dataset: Pictures, repeats: int) -> dict[str, Any]:
    """A row.

    Medians of seconds an epoch, bytes in the cache's file, bytes that a worker's own memory grew by
    while it filled.
    """
    first, second = [], []
    for _ in range(repeats):
        loader = _loader(kind, workers, CachedDataset(dataset))
        first.append(_epoch(loader))
        second.append(statistics.median(_epoch(loader) for _ in range(3)))
    cached = CachedDataset(dataset)
    grown = _growth(_loader(kind, workers, cached))
    for index, item in enumerate(
        item for batch in _loader(kind, workers, cached) for item in batch
    ):
        expected, found = (
            [head, *map(bytes, buffers)]
            for head, buffers in map(encode_item, (dataset[index], item))
        )
        assert expected == found, index
    return {
        "loader": kind,
        "workers": workers,
        "first_s": statistics.median(first),
        "second_s": statistics.median(second),
        "ratio": statistics.median(one / two for one, two in zip(first, second, strict=True)),
        "hit_ms": 1e3 * statistics.median(second) / len(dataset),
        "file_bytes": os.fstat(cached.cache.fd).st_blocks * 512,
        "grown_bytes": grown,
    }


def _loader(kind: str, workers: int, cached: CachedDataset) -> Any:
    # At run time a DataLoader takes any class with `__len__` and `__getitem__`; its type does not.
    make: Callable[..., Any] = CachedLoader if kind == "CachedLoader" else DataLoader
    context = multiprocessing.get_context("fork") if workers else None
    return make(
        cached,
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=context,
    )


def _epoch(loader: Any) -> float:
    start = time.perf_counter()
    count = sum(map(len, loader))
    seconds = time.perf_counter() - start
    assert count == len(loader.dataset)
    return seconds


def _growth(loader: Any) -> int:
    """Of the worker that grew most, from the first batch to the last but one.

    Only memory that it shares with nobody.
    """
    seen: Iterator[int] = (
        max((_own(child) for child in psutil.Process().children()), default=0) for _ in loader
    )
    sizes = [size for size in seen if size]
    return sizes[-1] - sizes[0] if sizes else 0


def _own(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


def _as_it_is(batch: list[Any]) -> list[Any]:
    return batch


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--milliseconds", type=float, default=10.0)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    torch.set_num_threads(1)
    dataset = Pictures(asked.items, calibrated(asked.milliseconds))
    start = time.process_time()
    for index in range(min(20, asked.items)):
        _ = dataset[index]
    each = (time.process_time() - start) / min(20, asked.items)
    rows = [
        measure(kind, workers, dataset, asked.repeats)
        for kind in ("CachedLoader", "DataLoader")
        for workers in asked.workers
    ]
    table = Table(
        title=(
            f"{asked.items} items, {1e3 * each:.1f} ms an item, medians of {asked.repeats}; "
            f"{os.cpu_count()} cores"
        )
    )
    for name in (
        "loader",
        "workers",
        "first epoch s",
        "second s",
        "ratio",
        "a hit ms",
        "in the file MB",
        "a worker's memory grew MB",
    ):
        table.add_column(name, justify="left" if name == "loader" else "right")
    for row in rows:
        table.add_row(
            row["loader"],
            str(row["workers"]),
            f"{row['first_s']:.2f}",
            f"{row['second_s']:.3f}",
            f"{row['ratio']:.0f}",
            f"{row['hit_ms']:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['grown_bytes'] / 1e6:.1f}",
        )
    Console(stderr=True, width=140).print(table)
    print(
        json.dumps({"items": asked.items, "ms": 1e3 * each, "cores": os.cpu_count(), "rows": rows})
    )


if __name__ == "__main__":
    main()
