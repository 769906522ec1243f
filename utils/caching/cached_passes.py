"""Held-out batches kept after their first pass, so that later evaluations neither read nor decode.

Purpose: `CachedPasses` wraps a loader whose passes over one epoch number are all identical.
Used by: utils.training.held_out
Design notes: batches go into a `TensorCache` in the order they come, so that what is kept is always
  the first part of the pass. The loader's state after that part is kept too. Later passes read the
  rest from there, and nothing is decoded only to be thrown away. Evaluation runs in one process, so
  there is one copy. A held-out split that the loader holds decoded in memory (store: memory) is not
  kept a second time unless the user asks for it.
Assistant guidance: when extending: a batch from here must equal the loader's bit for bit; the
  epoch's number is part of its identity.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from utils.caching.item_codec import encode_item
from utils.caching.tensor_cache import TensorCache, refuse_random
from utils.loading.stores import free_memory
from utils.log import get_log
from warehouse.errors import CorruptError

__all__ = ["CachedPasses"]

log = get_log(__name__)
Batch = dict[str, torch.Tensor]
SHARE_OF_FREE_MEMORY = 4
"""An unasked cache takes at most one part in this many of the free memory."""


class RepeatableLoader(Protocol):
    """A loader that can go back to where its state says; `utils.loader.ChunkLoader` is one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CachedPasses:
    """Iterate a loader, and keep the batches of its first pass.

    Only passes over the epoch number of the first pass are answered from the cache.

    Parameters
    ----------
    loader
        The loader. Its passes over one epoch number must be identical. Its attributes `store`,
        `augment` and `split` are looked at where it has them.
    wanted
        True keeps what fits. None keeps batches only if the whole pass fits into `limit_bytes` and
        into a quarter of the free memory, and if the loader neither holds the split in memory nor
        augments it. False keeps nothing.
    limit_bytes
        The largest size of the cache. Batches beyond it are read again in every pass.
    name
        What the log lines call the loader.

    Raises
    ------
    ConfigError
        If caching is wanted and the loader's augmentation is random.
    """

    def __init__(
        self, loader: RepeatableLoader, wanted: bool | None, limit_bytes: int, name: str
    ) -> None:
        self.loader, self.wanted, self.limit, self.name = loader, wanted, limit_bytes, name
        self.epoch, self.cached_epoch = 0, -1
        self.cache: TensorCache | None = None
        self.kept = 0
        self.after_kept: dict[str, Any] | None = None

        # These belong to ChunkLoader; another loader that can repeat a pass may lack them.
        store, augment = getattr(loader, "store", None), getattr(loader, "augment", None)
        self.decoded = wanted is None and store == "memory"
        if wanted:
            refuse_random(augment)
        elif augment is not None:
            self.wanted = False

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch number of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        if self.cached_epoch == -1:
            self.cached_epoch = self.epoch
        if self.epoch != self.cached_epoch:
            self.loader.set_epoch(self.epoch)
            yield from self._read(None)
            return

        for number in range(self.kept):
            assert self.cache is not None
            yield self.cache.get(number, _refuse_damage)
        if self.cache is not None:
            log.info("%s cache: %s", self.name, self.cache.stats)
        if self.kept == len(self):
            return

        self.loader.set_epoch(self.epoch)
        # Start behind the kept part: reading the pass from its beginning would decode batches only
        # to throw them away.
        if self.after_kept is not None:
            self.loader.load_state_dict(self.after_kept)
        yield from self._read(self.kept)

    def _read(self, first: int | None) -> Iterator[Batch]:
        """Read batches from the loader; keep them if the number of the first one is given."""
        source = iter(self.loader)
        try:
            for count in itertools.count():
                start = time.perf_counter()
                batch = next(source, None)
                if batch is None:
                    return
                seconds = time.perf_counter() - start
                number = None if first is None else first + count
                # A batch that follows one which was not kept would leave a gap.
                if number == self.kept and self.wanted is not False:
                    self._keep(number, batch, seconds)
                yield batch
        finally:
            # A pass that ends early must return the loader's buffers now, not when the garbage
            # collector comes by.
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def _keep(self, number: int, batch: Batch, seconds: float) -> None:
        if self.cache is None and self._fits(batch):
            self.cache = self._new_cache(batch)
        if self.cache is None:
            self.wanted = False
            return

        if self.cache.put(number, batch, seconds):
            self.kept, self.after_kept = number + 1, self.loader.state_dict()
        else:
            self.wanted = False

    def _fits(self, batch: Batch) -> bool:
        """Return whether to keep the pass, going by the size of its first batch; log why not."""
        size = sum(len(buffer) for buffer in encode_item(batch)[1]) * len(self)
        if self.decoded:
            log.info(
                "%s: will cache %d samples, %.1f MB: the loader holds them decoded in memory",
                self.name,
                self._samples(batch),
                size / 1e6,
            )
            return False

        if self.wanted is None and size > min(self.limit, free_memory() // SHARE_OF_FREE_MEMORY):
            log.info(
                "%s: not cached, since %.1f MB are more than the cache may take",
                self.name,
                size / 1e6,
            )
            return False
        return True

    def _new_cache(self, batch: Batch) -> TensorCache:
        cache = TensorCache(len(self), limit_bytes=self.limit, name=self.name)
        # A probe computes an item twice, but a loader gives each batch once. What is random was
        # refused when this object was made.
        cache.probes = 0
        cache.samples = self._samples(batch)
        return cache

    def _samples(self, batch: Batch) -> int:
        return len(getattr(self.loader, "split", ())) or len(self) * len(batch["index"])


def _refuse_damage() -> Batch:
    # The loader has moved on, so a damaged batch cannot be made again in its turn.
    raise CorruptError(
        "a kept batch is damaged",
        where="tensor cache",
        remedy="set cache_transformed_tensors: false",
    )
