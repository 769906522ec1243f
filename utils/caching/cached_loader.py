"""Batches of a cached dataset, without worker processes for the items that are kept.

Purpose: `CachedLoader` gives a `CachedDataset`'s items in a sampler's order, in batches or one by
  one.
Used by: benchmarks.tensor_cache
Design notes: a DataLoader moves every item of every epoch through shared memory of its own (1.6 ms
  for 201 KB), which is most of what a hit costs. Here workers put what they compute into the cache,
  whose pages the parent reads anyway, and answer that it is kept; only an item beyond the cache's
  limit is sent. So the first epoch needs no transport and later ones no workers, which end once
  everything is kept. The order is the sampler's for any number of workers. Each item is a new copy,
  as from the dataset.
Assistant guidance: when extending: an item from here equals the dataset's bit for bit; nothing
  random may come before the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

from torch.utils.data import DataLoader, default_collate, default_convert

from utils.caching.tensor_cache import CachedDataset
from warehouse.errors import ConfigError, WarehouseError, WorkerError

__all__ = ["CachedLoader"]


class CachedLoader:
    """Iterate a cached dataset in batches, as torch's DataLoader does.

    Parameters
    ----------
    dataset
        The cached dataset.
    batch_size
        Items in a batch; None gives single items.
    sampler
        Finitely many sample numbers, drawn anew for each epoch; 0, 1, ... when None.
    drop_last
        Whether a short last batch is left out.
    num_workers
        Processes that compute the items that are not kept yet; they end when all are. A second
        iteration at the same time takes them over, and the first one continues without them.
    collate_fn
        Makes a batch of a list of items, in this process. DataLoader's default when None; items of
        different shapes need one of their own.
    multiprocessing_context
        How the workers are started; as of DataLoader.

    Raises
    ------
    ConfigError
        If the options contradict each other.
    WorkerError
        While iterating, if a worker dies. A WarehouseError of a worker is raised as it is, and any
        other exception as DataLoader raises it.
    """

    def __init__(
        self,
        dataset: CachedDataset,
        *,
        batch_size: int | None = 1,
        sampler: Iterable[int] | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        multiprocessing_context: Any = None,
    ) -> None:
        if not isinstance(dataset, CachedDataset):
            found = type(dataset).__name__  # type: ignore[unreachable]
            raise ConfigError(
                "a cached loader needs a cached dataset",
                found=found,
                remedy="wrap it: CachedDataset(dataset)",
            )
        if (
            (batch_size is not None and batch_size < 1)
            or num_workers < 0
            or (batch_size is None and drop_last)
        ):
            raise ConfigError(
                "impossible setting of a cached loader",
                expected="batch_size >= 1, or None without drop_last; num_workers >= 0",
                found=f"batch_size {batch_size}, drop_last {drop_last}, num_workers {num_workers}",
            )
        self.dataset, self.batch_size, self.drop_last, self.num_workers = (
            dataset,
            batch_size,
            drop_last,
            num_workers,
        )
        self.sampler: Iterable[int] = range(len(dataset)) if sampler is None else sampler
        self.collate_fn = collate_fn or (default_convert if batch_size is None else default_collate)
        self.context = multiprocessing_context
        self._missing = _Order()
        self._workers: Any = None
        self._turn = 0

    def __len__(self) -> int:
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"{type(self.sampler).__name__} has no length")
        count = len(self.sampler)
        if self.batch_size is None:
            return count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        # The range turns negative numbers into positive ones and refuses numbers that do not exist,
        # before any worker is asked.
        items = self._items([range(len(self.dataset))[index] for index in self.sampler])
        if self.batch_size is None:
            yield from map(self.collate_fn, items)
            return
        while batch := list(itertools.islice(items, self.batch_size)):
            if len(batch) < self.batch_size and self.drop_last:
                return
            yield self.collate_fn(batch)

    def close(self) -> None:
        """End the workers; they are started again when they are needed.

        An iteration that was using them continues without them.
        """
        self._turn += 1
        workers, self._workers = self._workers, None
        running = getattr(workers, "_iterator", None)
        if running is not None:
            # Left to the garbage collector, which takes their queues first, each would be waited
            # for in vain for 5 s.
            running._shutdown_workers()

    def _items(self, order: list[int]) -> Iterator[Any]:
        try:
            yield from self._in_order(order)
        except RuntimeError as error:
            # PyTorch raises it on the child's signal, wherever this process is at that moment.
            self.close()
            if str(error).startswith("DataLoader worker (pid"):
                raise WorkerError(
                    "a worker of the cached loader died",
                    where=self.dataset.cache.name,
                    found=str(error).split("\n", 1)[0],
                    remedy="look for its message above; memory is the usual cause",
                ) from None
            raise
        except Exception:
            self.close()
            raise

    def _in_order(self, order: list[int]) -> Iterator[Any]:
        cache = self.dataset.cache
        kept = cache.kept_rows()
        missing = [index for index in order if not kept[index]] if not kept.all() else []
        # Workers would only be asked for what is kept already, at 1.6 ms an item.
        if not missing or not self.num_workers:
            self.close()
            yield from map(self.dataset.__getitem__, order)
            return
        self._turn += 1
        turn, answers = self._turn, self._ask(missing)
        for index in order:
            # Another iteration may have taken the workers over since this one began.
            if kept[index] or turn != self._turn:
                yield self.dataset[index]
                continue
            answer = next(answers)
            if isinstance(answer, WarehouseError):
                raise answer
            yield (
                cache.take(index, partial(self.dataset.dataset.__getitem__, index))
                if answer is None
                else answer[0]
            )
        if turn == self._turn and cache.kept_rows().all():
            self.close()

    def _ask(self, missing: list[int]) -> Iterator[Any]:
        """Yield what the workers answer for each number, in order."""
        if self._workers is None:
            # Two batches ahead over all workers, which each fetch single items.
            ahead = max(2, -(-2 * (self.batch_size or 1) // self.num_workers))
            # Map-style by its methods; torch names only its own base class.
            keeper: Any = _Keeper(self.dataset)
            self._workers = DataLoader(
                keeper,
                batch_size=None,
                sampler=self._missing,
                num_workers=self.num_workers,
                collate_fn=_as_it_is,
                prefetch_factor=ahead,
                persistent_workers=True,
                multiprocessing_context=self.context,
            )
        self._missing.indices = missing
        yield from self._workers


class _Order:
    """A sampler whose numbers are set anew for each epoch of the same workers."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Keeper:
    """In a worker: computes an item into the cache.

    Gives None once it is kept, (item,) where it did not fit, or the error to be raised.
    """

    def __init__(self, dataset: CachedDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.dataset[index]
        except WarehouseError as error:
            # As a value, since DataLoader would raise it again with a traceback as its message.
            return error
        return None if self.dataset.cache.has(index) else (item,)


def _as_it_is(answer: Any) -> Any:
    return answer
