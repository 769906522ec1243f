"""A cache of what a deterministic transform makes of each sample.

Purpose: `TensorCache` keeps items by sample number, once for a whole node; `CachedDataset` puts one
  before a map-style dataset.
Used by: benchmarks.tensor_cache, utils.caching.cached_loader, utils.caching.cached_passes
Design notes: an item that disagrees with its checksum is computed again. Rule of eviction: first
  come, first kept; at the limit the newcomer goes. A pass asks for each sample once, so evicting
  the least recently used item would trade hits for misses and end with no hit at all.
Assistant guidance: when extending: a hit and a miss give equal items, each a copy of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.caching.cache_file import CacheFile, Row, table_bytes
from utils.caching.cache_stats import CacheStats, SharedCounts
from utils.caching.fingerprints import CacheKey, fingerprint, name_of, refuse_random
from utils.caching.item_codec import decode_item, encode_item
from utils.log import get_log
from warehouse.errors import ConfigError

__all__ = ["CacheKey", "CacheStats", "CachedDataset", "TensorCache", "fingerprint", "refuse_random"]

log = get_log(__name__)
PROBES = 2
"""Items that are computed twice, to find a transform that is random."""
DAMAGE = (ValueError, KeyError, TypeError, IndexError, OSError, MemoryError)
"""What reading a damaged item may raise.

Not RuntimeError: PyTorch raises one wherever a process is when its DataLoader's worker dies.
"""


class MapDataset(Protocol):
    """What DataLoader calls a map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TensorCache:
    """Keep items by sample number.

    Each item that is returned is a new copy: contiguous, writeable, and the same on a hit and on a
    miss. See `utils.caching.item_codec` for what an item can be.

    Parameters
    ----------
    count
        The number of samples; items have the numbers 0 to count - 1.
    limit_bytes
        The largest size of the items and their table.
    name
        The name of the transform, for messages.
    transform
        What makes the items. A random one is refused: by its name, by an attribute `random`, or
        because it gives two different results for one sample (the first items are computed twice).
    key, folder
        Keep the items between runs, in ``folder/<split>-<digest>.cache``. Another key gives another
        file.

    Raises
    ------
    ConfigError
        If the limit is smaller than the table, the transform is random, or the file cannot be
        opened.
    """

    def __init__(
        self,
        count: int,
        *,
        limit_bytes: int = 1 << 30,
        name: str = "items",
        transform: object = None,
        key: CacheKey | None = None,
        folder: Path | None = None,
    ) -> None:
        if count < 0 or limit_bytes < table_bytes(count):
            raise ConfigError(
                "the tensor cache's limit is smaller than its table",
                where=name,
                expected=f"at least {table_bytes(count)} bytes",
                found=limit_bytes,
                remedy="raise cache_limit_mb, or switch the cache off",
            )
        refuse_random(transform)
        if (folder is None) != (key is None):
            raise ConfigError(
                "a tensor cache that is kept between runs needs both a folder and a key", where=name
            )
        path, digest = None, bytes(32)
        if folder is not None and key is not None:
            digest = key.digest(count)
            path = folder / f"{key.split}-{digest.hex()[:16]}.cache"

        self.count, self.limit, self.name = count, limit_bytes, name
        self.file = CacheFile(count, limit_bytes, digest, path)
        self.counts = SharedCounts()
        self.samples, self.probes, self.warned = count, PROBES, False
        # The process that logs how much will be kept; None once that is done.
        self.maker: int | None = os.getpid()

    @property
    def fd(self) -> int:
        """The descriptor of the file that the items lie in."""
        return self.file.fd

    @property
    def start(self) -> int:
        """Where the items begin in the file."""
        return self.file.start

    def get(self, index: int, compute: Callable[[], Any]) -> Any:
        """Return the item of a sample: the kept one, or one that is computed now and kept.

        Parameters
        ----------
        index
            The sample's number.
        compute
            Makes the item.

        Raises
        ------
        IndexError
            If there is no such sample.
        ConfigError
            If the item cannot be kept, or differs when it is computed again.
        """
        row = self.file.row(index)
        if row is not None:
            start = time.perf_counter()
            with contextlib.suppress(*DAMAGE):
                item = self.file.read(row)
                self._add(hits=1, seconds=row.seconds - (time.perf_counter() - start))
                return item
            self._add(damaged=1)
            self._warn("an item of the tensor cache is damaged and is computed again")
        start = time.perf_counter()
        item = compute()
        seconds = time.perf_counter() - start
        header, buffers = encode_item(item)

        # Whether a transform is random cannot be proved. Two items catch one whose name tells
        # nothing; more would double the cost of the first pass.
        if self.probes > 0:
            self.probes -= 1
            self._probe(compute, header, buffers)
        kept = self._append(index, header, buffers, seconds, row)
        self._add(misses=1, refused=int(not kept))
        # Not `item` itself: it may share memory with the dataset, and a miss must not differ from a
        # hit in layout or writeability.
        return decode_item(header, lambda leaves: _copy(buffers, leaves))

    def put(self, index: int, item: Any, seconds: float) -> bool:
        """Keep an item that took `seconds` to compute; return whether it fits.

        Raises
        ------
        ConfigError
            If the item is of a kind that cannot be kept.
        """
        kept = self._append(index, *encode_item(item), seconds, self.file.row(index))
        self._add(misses=1, refused=int(not kept))
        return kept

    def take(self, index: int, compute: Callable[[], Any]) -> Any:
        """Return an item as `get` does, whose miss was counted in the worker that computed it.

        A hit is not counted.
        """
        if self.maker is not None:
            self.announce()
        row = self.file.row(index)
        if row is not None:
            with contextlib.suppress(*DAMAGE):
                return self.file.read(row)
        return self.get(index, compute)

    def kept_rows(self) -> NDArray[np.bool_]:
        """Return which samples have a row, bool ``[count]``.

        A row may still turn out to be damaged; `get` then computes its item again.
        """
        return self.file.written_rows()

    def has(self, index: int) -> bool:
        """Return whether an item is kept, as far as its row tells."""
        return self.file.row(index) is not None

    @property
    def stats(self) -> CacheStats:
        """The counts so far, of this process and of the workers that share the cache."""
        return self.counts.stats(self.file.end() or 0)

    def _probe(self, compute: Callable[[], Any], header: bytes, buffers: list[memoryview]) -> None:
        again = encode_item(compute())
        if again[0] != header or any(
            bytes(one) != bytes(two) for one, two in zip(buffers, again[1], strict=True)
        ):
            raise ConfigError(
                "a transform that gives different results for one sample cannot be cached",
                where=self.name,
                remedy="cache what comes before its random part, "
                "or set cache_transformed_tensors: false",
            )

    def _append(
        self,
        index: int,
        header: bytes,
        buffers: list[memoryview],
        seconds: float,
        former: Row | None,
    ) -> bool:
        try:
            appended = self.file.append(index, header, buffers, seconds, former)
        except OSError as error:
            # A full disk costs speed but no result: the item was computed, and training goes on.
            self._warn(f"nothing more can be written to the tensor cache: {error.strerror}")
            return False
        if appended == "written":
            self._add(items=1)
        return appended != "full"

    def announce(self) -> None:
        """Log once how much will be kept, as estimated from the items that are kept so far.

        Only the process that made the cache does so, since spawned processes have no log.
        """
        end = self.file.end()
        if self.maker != os.getpid() or end is None or end == self.start:
            return
        self.maker = None
        whole = (end - self.start) * self.count / max(1, int(self.kept_rows().sum())) + self.start
        fit = "" if whole <= self.limit else f", of which {self.limit / 1e6:.1f} MB fit"
        log.info("%s: will cache %d samples, %.1f MB%s", self.name, self.samples, whole / 1e6, fit)

    def _add(self, *, seconds: float = 0.0, **counts: int) -> None:
        if self.maker is not None:
            self.announce()
        self.counts.add(seconds=seconds, **counts)

    def _warn(self, text: str) -> None:
        # Once: a damaged disk would give a line for each sample.
        if not self.warned:
            log.warning("%s: %s", text, self.file.path or self.name)
        self.warned = True


class CachedDataset:
    """A map-style dataset whose items are kept in a cache that DataLoader workers share.

    Parameters
    ----------
    dataset
        A dataset with `__len__` and `__getitem__`.
    limit_bytes, key, folder
        See `TensorCache`.
    transform
        What makes the dataset's items; a random one is refused, and messages name it. The dataset
        itself when None.

    Examples
    --------
    >>> cached = CachedDataset(pictures, limit_bytes=1 << 30)  # doctest: +SKIP
    >>> for item in map(cached.__getitem__, range(len(cached))):  # doctest: +SKIP
    ...     step(item)
    """

    def __init__(
        self,
        dataset: MapDataset,
        *,
        limit_bytes: int = 1 << 30,
        transform: object = None,
        key: CacheKey | None = None,
        folder: Path | None = None,
    ) -> None:
        what = dataset if transform is None else transform
        self.dataset = dataset
        self.cache = TensorCache(
            len(dataset),
            limit_bytes=limit_bytes,
            name=name_of(what),
            transform=what,
            key=key,
            folder=folder,
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        # Negative numbers count from the end, as in a list, and others raise IndexError.
        index = range(len(self))[index]
        return self.cache.get(index, lambda: self.dataset[index])

    def log_stats(self) -> None:
        """Log the counts of the cache."""
        log.info("%s cache: %s", self.cache.name, self.cache.stats)


def _copy(buffers: list[memoryview], leaves: list[Any]) -> None:
    for buffer, leaf in zip(buffers, leaves, strict=True):
        memoryview(leaf).cast("B")[:] = buffer
