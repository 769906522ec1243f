"""Held-out batches kept after their first pass, so that later evaluations neither read nor decode.

Purpose: `CachedPasses` stands before a loader whose passes over one epoch number are all alike.
Used by: utils.training.held_out
Design notes: batches go into a `TensorCache` in the order they come; what is kept is always the
  first part of the pass. The loader's state after it is kept too: the rest is read from there, and
  nothing is decoded to be thrown away. Evaluated in one process, so one copy. A held-out split that
  the loader has decoded in memory (store: memory) is not kept a second time unless asked for.
Assistant guidance: when extending: a batch from here must equal the loader's bit for bit; the
  epoch's number is part of its identity.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

from utils.caching.item_codec import encode_item
from utils.caching.tensor_cache import TensorCache, refuse_random
from utils.loading.stores import free_memory
from utils.log import get_log
from warehouse.errors import CorruptError

__all__ = ["CachedPasses"]

log = get_log(__name__)


class CachedPasses:
    """A loader with the ChunkLoader contract whose passes over one epoch number are all the same:
    batches are kept after the first.

    wanted: True keeps what fits; None does so only where the whole pass fits into limit_bytes and a
    quarter of the free memory, and the loader neither holds the split in memory anyway nor
    augments; False never. What does not fit is read again from where it begins.
    """

    def __init__(self, loader: Any, wanted: bool | None, limit_bytes: int, name: str) -> None:
        self.loader, self.wanted, self.limit, self.name = loader, wanted, limit_bytes, name
        self.epoch, self.cached_epoch = 0, -1
        self.cache: TensorCache | None = None
        self.kept = 0
        self.after_kept: dict[str, Any] | None = None
        self.decoded = wanted is None and getattr(loader, "store", None) == "memory"
        if wanted:
            refuse_random(getattr(loader, "augment", None))
        elif getattr(loader, "augment", None) is not None:
            self.wanted = False

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        if self.cached_epoch == -1:
            self.cached_epoch = self.epoch
        own = self.epoch == self.cached_epoch
        for number in range(self.kept if own else 0):
            assert self.cache is not None
            yield self.cache.get(number, _never)
        if own and self.cache is not None:
            log.info("%s cache: %s", self.name, self.cache.stats)
        if own and self.kept == len(self):
            return
        self.loader.set_epoch(self.epoch)
        if own and self.after_kept is not None:
            self.loader.load_state_dict(self.after_kept)
        source = iter(self.loader)
        try:
            for number in itertools.count(self.kept if own else 0):
                start = time.perf_counter()
                batch = next(source, None)
                if batch is None:
                    return
                if own and self.wanted is not False and number == self.kept:
                    self._keep(number, batch, time.perf_counter() - start)
                yield batch
        finally:
            if hasattr(source, "close"):
                source.close()

    def _keep(self, number: int, batch: Any, seconds: float) -> None:
        if self.cache is None:
            size = sum(len(buffer) for buffer in encode_item(batch)[1]) * len(self)
            samples = len(getattr(self.loader, "split", ())) or len(self) * len(batch["index"])
            if self.decoded:
                log.info(
                    "%s: will cache %d samples, %.1f MB: the loader holds them decoded in memory",
                    self.name,
                    samples,
                    size / 1e6,
                )
                self.wanted = False
                return
            if self.wanted is None and size > min(self.limit, free_memory() // 4):
                log.info(
                    "%s: %.1f MB are more than the cache may take: not cached",
                    self.name,
                    size / 1e6,
                )
                self.wanted = False
                return
            self.cache = TensorCache(len(self), limit_bytes=self.limit, name=self.name)
            self.cache.probes = 0
            self.cache.samples = samples
        if self.cache.put(number, batch, seconds):
            self.kept, self.after_kept = number + 1, self.loader.state_dict()
        else:
            self.wanted = False


def _never() -> Any:
    raise CorruptError(
        "a kept batch is damaged",
        where="tensor cache",
        remedy="set cache_transformed_tensors: false",
    )
