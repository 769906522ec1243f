"""The order of batches in an epoch, G, as a function from a batch's number to its samples.

Purpose: `ChunkOrder` keeps a batch inside stored chunks, `RandomOrder` ignores them; `permutation`
  and `mix64` are their only randomness.
Used by: utils.augment, utils.loading.batch_sampler, utils.loading.batches, utils.loading.local,
  utils.loading.spawn, utils.samplers, vqvae.block_sampling
Design notes: G is a pure function of (chunk sizes, batch size, options, seed, epoch). Any batch of
  it is computed on its own, without the ones before: permutations are argsorts of a 64-bit hash
  (stable over NumPy releases), lanes are searched in cumulative counts. Memory and start-up of
  `ChunkOrder` grow with the number of stored chunks, never with samples.
Assistant guidance: when extending: no torch, no I/O, no global generator.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BatchPlan",
    "ChunkOrder",
    "Order",
    "OrderOptions",
    "RandomOrder",
    "mix64",
    "permutation",
]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One batch to deliver.

    Attributes
    ----------
    number
        The batch's number in G.
    indices
        Its sample indices, int64 ``[B]``.
    pad
        Whether it is a repeat that only fills up a rank.
    """

    number: int
    indices: NDArray[np.int64]
    pad: bool = False


class Order(Protocol):
    """G of one epoch: `total` batches, each by its number."""

    total: int

    def batch(self, number: int) -> NDArray[np.int64]:
        """Return the sample indices of a batch, int64 ``[B]``."""


class OrderOptions(Protocol):
    """What an order takes from its sampler; see `BatchSampler`."""

    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    interleave: int
    chunks_per_batch: int


def mix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the splitmix64 step and finaliser (Steele, Lea, Flood 2014), elementwise."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        value ^= value >> np.uint64(shift)
        value *= np.uint64(factor)
    return value


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of range(size) that depends on `key` alone, int64 ``[size]``.

    The indices are sorted by the splitmix64 hash of (key, index).
    """
    # Not numpy.random, whose shuffles may change between releases and with them every saved order.
    base = np.zeros(1, np.uint64)
    for part in key:
        base = mix64(base ^ np.uint64(part & _MASK))
    keys = np.arange(size, dtype=np.uint64)
    # In parts, so that the temporaries stay small.
    for start in range(0, size, 1 << 16):
        keys[start : start + (1 << 16)] = mix64(keys[start : start + (1 << 16)] + base)
    # mix64 is a bijection: there are no ties, so that any sort gives the same order.
    return np.argsort(keys)


class ChunkOrder:
    """G of one epoch, in which a batch stays inside its unit of stored chunks.

    A unit is `chunks_per_batch` chunks whose samples are permuted together; lanes deal units out in
    turn.

    Parameters
    ----------
    sizes
        Samples in each stored chunk, int64 ``[chunks]``.
    sampler
        The options.
    epoch
        The epoch.
    """

    def __init__(self, sizes: NDArray[np.int64], sampler: OrderOptions, epoch: int) -> None:
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

        # Batches in each unit. Only their number is kept; which samples they hold is computed when
        # they are asked for.
        per, lanes = sampler.chunks_per_batch, sampler.interleave
        units = sizes[chunks]
        if per > 1 and len(units):
            units = np.add.reduceat(units, np.arange(0, len(chunks), per))
        units += 0 if sampler.drop_last else sampler.batch_size - 1
        units //= sampler.batch_size
        self.unit_batches = units.astype(np.int32)

        # Unit u belongs to lane u % lanes. In 64 bits, since the sum over a lane may exceed 32.
        full = len(units) // lanes * lanes
        self.lane_batches = units[:full].reshape(-1, lanes).sum(axis=0, dtype=np.int64)
        self.lane_batches[: len(units) - full] += units[full:]

        # Rounds in which the same lanes have batches left form a segment: it begins in round
        # `rounds[k]`, at position `first_batch[k]` of G.
        self.rounds = np.concatenate(([0], np.unique(self.lane_batches)))
        alive = np.array(
            [(self.lane_batches > start).sum() for start in self.rounds[:-1]], dtype=np.int64
        )
        self.first_batch = np.concatenate(([0], np.cumsum(alive * np.diff(self.rounds))))
        self.total = int(self.lane_batches.sum())

        # Caches of this object and not of its class, which would keep former epochs alive.
        self._lane = lru_cache(maxsize=None)(self._lane_ends)
        self._alive = lru_cache(maxsize=None)(
            lambda segment: np.flatnonzero(self.lane_batches > self.rounds[segment])
        )
        # Each batch would otherwise permute its whole unit again. Lanes take turns, so a unit of
        # each lane is in use at a time.
        self._samples = lru_cache(maxsize=2 * lanes + 2)(self._unit_samples)

    def batch(self, number: int) -> NDArray[np.int64]:
        """Return the sample indices of a batch, int64 ``[B]``."""
        # bisect, since np.searchsorted lets go of the GIL and waits behind the decode threads to
        # get it back.
        segment = bisect_right(self.first_batch, number) - 1
        alive = self._alive(segment)
        turn, position = divmod(number - int(self.first_batch[segment]), len(alive))
        lane, at = int(alive[position]), int(self.rounds[segment]) + turn

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


class RandomOrder:
    """G of one epoch, in which a batch takes its samples from anywhere."""

    def __init__(self, samples: int, sampler: OrderOptions, epoch: int) -> None:
        self.order = (
            permutation(samples, sampler.seed, epoch, 2) if sampler.shuffle else np.arange(samples)
        )
        self.size = sampler.batch_size
        self.total = samples // self.size if sampler.drop_last else -(-samples // self.size)

    def batch(self, number: int) -> NDArray[np.int64]:
        """Return the sample indices of a batch, int64 ``[B]``."""
        return self.order[number * self.size : (number + 1) * self.size]
