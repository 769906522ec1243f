"""How well an order is shuffled, as two numbers, each divided by what a full shuffle would give:
1.00 is a full shuffle.

distance: mean |position(i) - position(i + 1)| of source neighbours in the order delivered; a full
shuffle gives (N + 1) / 3. class_run: mean length of runs of one class, with classes in ten
source-contiguous blocks (class folders, dates, video clips); a full shuffle of class counts n_c
gives N / (1 + (N - 1)(1 - sum n_c (n_c - 1) / (N (N - 1)))). Above 1.00 the order is clumped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import Work
from warehouse import Warehouse

__all__ = [
    "class_run",
    "expected_class_run",
    "expected_distance",
    "measure_shuffle",
    "neighbour_distance",
]

CLASSES = 10
EPOCHS = 4


def neighbour_distance(order: NDArray[np.int64]) -> float:
    """Mean distance between the positions of source neighbours. order.

    The source numbers 0..N-1, as delivered.
    """
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    return float(np.abs(np.diff(position)).mean())


def expected_distance(count: int) -> float:
    """`neighbour_distance` of a full shuffle of `count` samples, on average."""
    return (count + 1) / 3


def class_run(classes: NDArray[np.int64]) -> float:
    """Mean length of runs of equal values."""
    return len(classes) / (1 + int((np.diff(classes) != 0).sum()))


def expected_class_run(counts: Sequence[int] | NDArray[np.int64]) -> float:
    """`class_run` of a full shuffle with `counts` samples of each class.

    N over the expected number of runs.
    """
    counts = np.asarray(counts, np.int64)
    total = int(counts.sum())
    if total < 2:
        return float(total)
    same = float((counts * (counts - 1)).sum()) / (total * (total - 1))
    return total / (1 + (total - 1) * (1 - same))


def quality(orders: Sequence[NDArray[np.int64]]) -> dict[str, float]:
    """Both numbers, averaged over epochs; each order holds source numbers 0..N-1."""
    count = len(orders[0])
    block = -(-count // CLASSES)
    expected = expected_class_run(np.bincount(np.arange(count) // block))
    return {
        "distance": float(np.mean([neighbour_distance(order) for order in orders]))
        / expected_distance(count),
        "class_run": float(np.mean([class_run(order // block) for order in orders])) / expected,
    }


def measure_shuffle(work: Work, log: Any) -> list[dict[str, Any]]:
    """Rows {order, permuted, distance, class_run} of what ChunkLoader really delivers from the
    `quality` warehouse.

    permuted: whether the build's permutation is counted in. Without it a sample's stored number
    stands for its source number, which is what a build in source order would store.
    """
    from utils.loader import ChunkLoader
    from utils.samplers import RandomBatchSampler

    split, batch = work.split("quality"), work.settings.batch_size
    chunked = [(interleave, per_batch) for interleave in (1, 4, 16) for per_batch in (1, 4, 16)]
    options: list[tuple[str, dict[str, Any]]] = [
        (
            f"interleave {interleave}, chunks_per_batch {per_batch}",
            {"interleave": interleave, "chunks_per_batch": per_batch},
        )
        for interleave, per_batch in chunked
    ]
    batch = min(batch, split.shard_samples)
    options += [
        ("RandomBatchSampler", {"sampler": RandomBatchSampler(split.chunk_sizes, batch)}),
        ("not shuffled", {"shuffle": False}),
    ]
    source = source_numbers(work)
    rows = []
    for name, option in options:
        size = None if "sampler" in option else batch
        with ChunkLoader(split, size, arrays=["letterbox"], engine="inline", **option) as loader:
            orders = []
            for epoch in range(EPOCHS):
                loader.set_epoch(epoch)
                orders.append(np.concatenate([item["index"].numpy() for item in loader]))
        mapped = {True: [source[order] for order in orders], False: orders}
        rows += [
            {"order": name, "permuted": permuted} | quality(orders)
            for permuted, orders in mapped.items()
        ]
    log.info(
        f"shuffle of {len(split)} samples in {len(split.chunk_sizes)} stored chunks, "
        f"batch {batch}; 1.00 is a full shuffle"
    )
    for row in rows:
        built = "permuted at build" if row["permuted"] else "stored in source order"
        log.info(
            f"  {row['order']:<36} {built:<24} neighbour distance {row['distance']:.2f}, "
            f"class run {row['class_run']:.2f}"
        )
    return rows


def source_numbers(work: Work) -> NDArray[np.int64]:
    """Source number (by name) of each stored sample of the `quality` warehouse."""
    table = Warehouse.open(work.path("quality")).table("samples.parquet", ["index", "source"])
    names = [
        name
        for _, name in sorted(
            zip(table["index"].to_pylist(), table["source"].to_pylist(), strict=True)
        )
    ]
    rank = {name: at for at, name in enumerate(sorted(names))}
    return np.array([rank[name] for name in names])
