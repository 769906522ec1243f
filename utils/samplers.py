"""Epoch orders as index arithmetic: which samples make batch g of an epoch, for any rank, from any
place on.

Purpose: `ChunkBatchSampler` keeps a batch inside one stored chunk; `RandomBatchSampler` ignores
  chunks, as a control.
Used by: benchmarks.data, benchmarks.scale, benchmarks.shuffle, utils.augment, utils.loader,
  utils.loading.batches, utils.loading.engines, utils.loading.local, utils.loading.sources,
  utils.loading.spawn, utils.loading.stores, vqvae.block_sampling, vqvae.training
Design notes: the global order G is a pure function of (chunk sizes, batch size, options, seed,
  epoch). Any batch of it is computed on its own, without the ones before: permutations are argsorts
  of a 64-bit hash (stable over NumPy releases), lanes are searched in cumulative counts. Memory and
  start-up grow with the number of stored chunks, never with samples. From global batch d on, rank r
  of W takes G[d+r::W].
Assistant guidance: when extending: no torch, no I/O, no global generator; a new option goes into
  `options()`, so that states of another order are refused.
"""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import ConfigError, StateError

__all__ = ["BatchPlan", "BatchSampler", "ChunkBatchSampler", "RandomBatchSampler", "mix64"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One batch to deliver.

    Its number in G, its sample indices (int64), and whether it only fills up a rank.
    """

    number: int
    indices: NDArray[np.int64]
    pad: bool = False


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 step and finaliser (Steele, Lea, Flood 2014), elementwise."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value ^= value >> np.uint64(shift)
        value *= np.uint64(factor)
    return value


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(size) that follows from `key` alone.

    Indices sorted by the splitmix64 hash of (key, index).
    """
    base = np.zeros(1, np.uint64)
    for part in key:
        base = mix64(base ^ np.uint64(part & _MASK))
    keys = np.arange(size, dtype=np.uint64)
    for start in range(0, size, 1 << 16):  # in pieces, for small temporaries
        keys[start : start + (1 << 16)] = mix64(keys[start : start + (1 << 16)] + base)
    return np.argsort(
        keys
    )  # mix64 is a bijection: there are no ties, so that any sort gives the same


class _ChunkOrder:
    """G of one epoch.

    A unit is `chunks_per_batch` chunks whose samples are permuted together; lanes deal units out in
    turn.
    """

    def __init__(self, sizes: NDArray[np.int64], sampler: ChunkBatchSampler, epoch: int) -> None:
        self.sizes, self.sampler, self.epoch = sizes, sampler, epoch
        self.starts = np.concatenate(([0], np.cumsum(sizes)))[:-1]
        chunks = (
            permutation(len(sizes), sampler.seed, epoch, 0)
            if sampler.shuffle
            else np.arange(len(sizes))
        )
        # All that grows with the stored chunks is kept small: there may be millions on each of a
        # thousand ranks.
        self.chunks = chunks = chunks.astype(np.int32)
        per, lanes = sampler.chunks_per_batch, sampler.interleave
        units = sizes[chunks]
        if per > 1 and len(units):
            units = np.add.reduceat(units, np.arange(0, len(chunks), per))
        units += 0 if sampler.drop_last else sampler.batch_size - 1
        units //= sampler.batch_size
        self.unit_batches = units.astype(np.int32)
        whole = len(units) // lanes * lanes
        self.lane_batches = units[:whole].reshape(-1, lanes).sum(axis=0, dtype=np.int64)
        self.lane_batches[: len(units) - whole] += units[whole:]
        # Rounds in which the same lanes are alive form a segment: from round `rounds[k]`, at place
        # `places[k]` of G.
        self.rounds = np.concatenate(([0], np.unique(self.lane_batches)))
        alive = np.array(
            [(self.lane_batches > start).sum() for start in self.rounds[:-1]], dtype=np.int64
        )
        self.places = np.concatenate(([0], np.cumsum(alive * np.diff(self.rounds))))
        self.total = int(self.lane_batches.sum())
        self._lane = lru_cache(maxsize=None)(self._lane_ends)
        self._alive = lru_cache(maxsize=None)(
            lambda segment: np.flatnonzero(self.lane_batches > self.rounds[segment])
        )
        self._samples = lru_cache(maxsize=2 * lanes + 2)(self._unit_samples)

    def batch(self, number: int) -> NDArray[np.int64]:
        # bisect, since np.searchsorted lets go of the GIL and waits behind the decode threads to
        # get it back.
        segment = bisect_right(self.places, number) - 1
        alive = self._alive(segment)
        turn, place = divmod(number - int(self.places[segment]), len(alive))
        lane, at = int(alive[place]), int(self.rounds[segment]) + turn
        ends = self._lane(lane)
        unit_in_lane = bisect_right(ends, at)
        cut = at - (int(ends[unit_in_lane - 1]) if unit_in_lane else 0)
        size = self.sampler.batch_size
        return self._samples(lane + unit_in_lane * self.sampler.interleave)[
            cut * size : (cut + 1) * size
        ]

    def _lane_ends(self, lane: int) -> NDArray[np.int64]:
        return np.cumsum(self.unit_batches[lane :: self.sampler.interleave])

    def _unit_samples(self, unit: int) -> NDArray[np.int64]:
        per = self.sampler.chunks_per_batch
        chunks = self.chunks[unit * per : (unit + 1) * per]
        samples = np.concatenate(
            [
                np.arange(self.starts[chunk], self.starts[chunk] + self.sizes[chunk])
                for chunk in chunks
            ]
        )
        if not self.sampler.shuffle:
            return samples
        return samples[permutation(len(samples), self.sampler.seed, self.epoch, 1, int(chunks[0]))]


class _RandomOrder:
    def __init__(self, samples: int, sampler: RandomBatchSampler, epoch: int) -> None:
        self.order = (
            permutation(samples, sampler.seed, epoch, 2) if sampler.shuffle else np.arange(samples)
        )
        self.size = sampler.batch_size
        self.total = samples // self.size if sampler.drop_last else -(-samples // self.size)

    def batch(self, number: int) -> NDArray[np.int64]:
        return self.order[number * self.size : (number + 1) * self.size]


class BatchSampler:
    """What both samplers share: validation, ranks, epochs and state.

    Iterating gives lists of sample indices.
    """

    STATE_KEYS: ClassVar[tuple[str, ...]] = (
        "sampler",
        "samples",
        "chunks",
        "batch_size",
        "shuffle",
        "seed",
        "drop_last",
        "interleave",
        "chunks_per_batch",
    )

    def __init__(
        self,
        chunk_sizes: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        interleave: int = 1,
        chunks_per_batch: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sizes = np.asarray(chunk_sizes, dtype=np.int64).reshape(-1)
        if self.sizes.size and self.sizes.min() < 1:
            raise ConfigError(
                "chunk sizes must be positive", where="chunk_sizes", found=int(self.sizes.min())
            )
        for name, value in {
            "batch_size": batch_size,
            "interleave": interleave,
            "chunks_per_batch": chunks_per_batch,
            "world_size": world_size,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number", found=repr(value))
        if not 0 <= rank < world_size:
            raise ConfigError(
                "rank must be below world_size", expected=f"0..{world_size - 1}", found=rank
            )
        if seed < 0:
            raise ConfigError("seed must not be negative", found=seed)
        self.batch_size, self.shuffle, self.seed, self.drop_last = (
            int(batch_size),
            bool(shuffle),
            int(seed),
            bool(drop_last),
        )
        self.interleave, self.chunks_per_batch, self.rank, self.world_size = (
            int(interleave),
            int(chunks_per_batch),
            int(rank),
            int(world_size),
        )
        self.epoch = 0
        self.position = 0
        self._resuming = False
        self._order: tuple[int, Any] | None = None

    def _make_order(self, epoch: int) -> Any:
        raise NotImplementedError

    @property
    def order(self) -> Any:
        """G of the current epoch: `total` batches, `batch(number)` -> int64 indices."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self._make_order(self.epoch))
        return self._order[1]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next.

        A loaded position is kept when it belongs to this very epoch.
        """
        if epoch != self.epoch:
            self.epoch, self.position, self._resuming = int(epoch), 0, False

    @property
    def start(self) -> int:
        """The global batch the next iteration begins with."""
        return self.position if self._resuming else 0

    def begin(self) -> int:
        """Consume a loaded position: the global batch this iteration begins with.

        Iterating again starts the epoch anew.
        """
        start, self._resuming = self.start, False
        self.position = start
        return start

    def after(self, start: int, delivered: int) -> int:
        """The global position once this rank has delivered `delivered` batches from `start` on."""
        return min(int(self.order.total), start + delivered * self.world_size)

    def batches(self, start: int) -> Iterator[BatchPlan]:
        """This rank's share of G[start:], in order; the last may be a repeat with `pad` set.

        Does not move the position.
        """
        order, left = self.order, self.order.total - start
        rounds = left // self.world_size if self.drop_last else -(-left // self.world_size)
        for turn in range(rounds):
            number = start + turn * self.world_size + self.rank
            pad = number >= order.total
            if pad:
                number = start + (number - start) % left
            yield BatchPlan(number, order.batch(number), pad)

    def __iter__(self) -> Iterator[list[int]]:
        start = self.begin()
        for count, plan in enumerate(self.batches(start), 1):
            self.position = self.after(start, count)
            yield plan.indices.tolist()

    def __len__(self) -> int:
        """Batches the next iteration gives this rank."""
        left = int(self.order.total) - self.start
        return left // self.world_size if self.drop_last else -(-left // self.world_size)

    def options(self) -> dict[str, Any]:
        """What G depends on beside the epoch."""
        return {
            "sampler": type(self).__name__,
            "samples": int(self.sizes.sum()),
            "chunks": hashlib.sha256(self.sizes.tobytes()).hexdigest()[:16],
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "interleave": self.interleave,
            "chunks_per_batch": self.chunks_per_batch,
        }

    def state_dict(self) -> dict[str, Any]:
        return self.options() | {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved place.

        Raises StateError naming the first option that differs; the rank count may differ.
        """
        own = self.options()
        for key in self.STATE_KEYS:
            if key not in state or state[key] != own[key]:
                raise StateError(
                    f"this state belongs to another {key}",
                    expected=own[key],
                    found=state.get(key, "nothing"),
                    remedy="use the options the state was saved with, or start afresh",
                )
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or position < 0:
            raise StateError(
                "this state has no epoch and position",
                found=f"epoch {epoch!r}, position {position!r}",
            )
        self.epoch = epoch
        if position > self.order.total:
            raise StateError(
                "this state lies beyond its epoch",
                expected=f"at most {self.order.total} batches",
                found=position,
            )
        self.position, self._resuming = position, True


class ChunkBatchSampler(BatchSampler):
    """Batches that each lie in one stored chunk (or in `chunks_per_batch` of them), every sample
    once an epoch.

    G: the chunks are permuted and dealt to `interleave` lanes; within a chunk the samples are
    permuted and cut into batches; the lanes give batches in turn. With `drop_last` batches shorter
    than batch_size, and the tail that does not fill all ranks, are left out; without it the tail is
    filled up with repeats that `batches()` marks `pad`. With world_size dividing interleave, ranks
    read disjoint chunks. Raises ConfigError; warns when no chunk holds a whole batch.
    """

    def __init__(self, chunk_sizes: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(chunk_sizes, batch_size, **options)
        largest = int(self.sizes.max()) * self.chunks_per_batch if self.sizes.size else 0
        if self.sizes.size and self.batch_size > largest:
            text = f"batch_size {self.batch_size} is above the {largest} samples of a stored chunk: every batch will be short"
            warnings.warn(
                f"{text}; lower it, raise chunks_per_batch, or build with a larger build.shard_samples",
                stacklevel=2,
            )

    def _make_order(self, epoch: int) -> _ChunkOrder:
        return _ChunkOrder(self.sizes, self, epoch)


class RandomBatchSampler(BatchSampler):
    """Batches drawn from the whole split, ignoring chunks: a full shuffle.

    What that costs: a batch of B touches up to B stored chunks, so B files are mapped and paged in
    for each; on a cold disk or a network store every sample is a seek. Memory: 8 bytes a sample.
    `interleave` and `chunks_per_batch` mean nothing here and are refused. Raises ConfigError.
    """

    def __init__(self, chunk_sizes: Sequence[int], batch_size: int, **options: Any) -> None:
        super().__init__(chunk_sizes, batch_size, **options)
        if self.interleave != 1 or self.chunks_per_batch != 1:
            raise ConfigError(
                "RandomBatchSampler ignores chunks: interleave and chunks_per_batch mean nothing to it",
                found=f"{self.interleave}, {self.chunks_per_batch}",
                remedy="leave them away or use ChunkBatchSampler",
            )

    @property
    def chunks_touched(self) -> float:
        """Expected number of stored chunks one batch reads from, against 1 for ChunkBatchSampler."""
        share = self.sizes / max(1, self.sizes.sum())
        return float(np.sum(-np.expm1(self.batch_size * np.log1p(-np.minimum(share, 1 - 1e-12)))))

    def _make_order(self, epoch: int) -> _RandomOrder:
        return _RandomOrder(int(self.sizes.sum()), self, epoch)
