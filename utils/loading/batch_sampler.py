"""The base of all samplers: their options, ranks and epochs, and a state to resume from.

Purpose: `BatchSampler` deals the batches of an order to ranks, and keeps the position in it.
Used by: utils.loading.engines, utils.loading.sources, utils.loading.stores, utils.samplers
Design notes: from global batch d on, rank r of W takes G[d+r::W]; a state saved by W ranks is
  therefore good for any other number of them. The position counts batches of G, not of a rank.
Assistant guidance: when extending: a new option goes into `options()`, so that states of another
  order are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from utils.loading.orders import BatchPlan, Order
from warehouse.errors import ConfigError, StateError

__all__ = ["BatchSampler"]


class BatchSampler:
    """The base class of samplers, which iterate lists of sample indices.

    Parameters
    ----------
    chunk_sizes
        Samples in each stored chunk, from `Split.chunk_sizes`.
    batch_size
        Samples in a batch; the last batch of the group of chunks it is cut from may be shorter.
    shuffle, seed
        Whether the order is drawn anew each epoch, from (seed, epoch).
    drop_last
        Whether short batches, and a tail that does not fill all ranks, are left out.
    interleave
        Chunks, or groups of them, that give batches in turn. More of them shuffle more finely, but
        keep more files open.
    chunks_per_batch
        Chunks whose samples are permuted together.
    rank, world_size
        Which share of the batches this process takes.

    Raises
    ------
    ConfigError
        If a value is impossible.
    """

    by_chunk = True
    """Whether batches keep to stored chunks, so that these can be fetched one after the other."""

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
            # True is an int in Python, and NumPy's integers are not.
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{name} must be a positive whole number", found=repr(value))
        if not 0 <= rank < world_size:
            raise ConfigError(
                "rank must be below world_size", expected=f"0..{world_size - 1}", found=rank
            )
        if seed < 0:
            raise ConfigError("seed must not be negative", found=seed)
        self.batch_size, self.shuffle = int(batch_size), bool(shuffle)
        self.seed, self.drop_last = int(seed), bool(drop_last)
        self.interleave, self.chunks_per_batch = int(interleave), int(chunks_per_batch)
        self.rank, self.world_size = int(rank), int(world_size)
        self.epoch = 0
        self.position = 0
        self._resuming = False
        self._order: tuple[int, Order] | None = None

    def _make_order(self, epoch: int) -> Order:
        raise NotImplementedError

    @property
    def order(self) -> Order:
        """The order of the current epoch, which docs and comments call G."""
        # Kept for the epoch: its size grows with the stored chunks, of which there may be millions.
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self._make_order(self.epoch))
        return self._order[1]

    @property
    def largest_batch(self) -> int:
        """The largest number of samples in a batch, which is what ring buffers are made for."""
        # No more than its chunks hold: a batch_size far above that would reserve memory in vain.
        if self.by_chunk:
            available = int(self.sizes.max(initial=1)) * self.chunks_per_batch
        else:
            available = int(self.sizes.sum())
        return max(1, min(self.batch_size, available))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next.

        A loaded position is kept if it belongs to this epoch.
        """
        if epoch != self.epoch:
            self.epoch, self.position, self._resuming = int(epoch), 0, False

    @property
    def start(self) -> int:
        """The global batch with which the next iteration begins."""
        return self.position if self._resuming else 0

    def begin(self) -> int:
        """Return the global batch with which this iteration begins, and forget a loaded position.

        Iterating again starts the epoch from its first batch.
        """
        start, self._resuming = self.start, False
        self.position = start
        return start

    def after(self, start: int, delivered: int) -> int:
        """Return the global position after this rank has delivered so many batches from `start`."""
        # Ranks take turns, so that each of them knows where all stand without asking the others.
        return min(int(self.order.total), start + delivered * self.world_size)

    def batches(self, start: int) -> Iterator[BatchPlan]:
        """Yield this rank's share of G[start:] in order; the position does not move.

        The last batch may be a repeat with `pad` set.
        """
        order, left = self.order, self.order.total - start
        rounds = left // self.world_size if self.drop_last else -(-left // self.world_size)
        for turn in range(rounds):
            number = start + turn * self.world_size + self.rank
            # All ranks must take equally many steps, or the gradient exchange of the last one would
            # wait for ever.
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
        """Return the number of batches that the next iteration gives this rank."""
        left = int(self.order.total) - self.start
        return left // self.world_size if self.drop_last else -(-left // self.world_size)

    def options(self) -> dict[str, Any]:
        """Return what G depends on besides the epoch."""
        # Without rank and world_size, since another number of ranks may load a state.
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
        """Return the options, the epoch and the position, as JSON can hold them."""
        return self.options() | {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, also with another number of ranks.

        Raises
        ------
        StateError
            If an option differs from the saved one; the message names the first.
        """
        own = self.options()
        for key in own:
            if key not in state or state[key] != own[key]:
                raise StateError(
                    f"this state belongs to another {key}",
                    expected=own[key],
                    found=state.get(key, "nothing"),
                    remedy="use the options the state was saved with, or start afresh",
                )
        # A state is read from a file: it may hold anything.
        epoch, position = state.get("epoch"), state.get("position")
        if not isinstance(epoch, int) or not isinstance(position, int) or epoch < 0 or position < 0:
            raise StateError(
                "this state has no epoch and position",
                found=f"epoch {epoch!r}, position {position!r}",
            )
        # The order of the saved epoch, since `total` can differ between epochs of unequal chunks.
        self.epoch = epoch
        if position > self.order.total:
            raise StateError(
                "this state lies beyond its epoch",
                expected=f"at most {self.order.total} batches",
                found=position,
            )
        self.position, self._resuming = position, True
