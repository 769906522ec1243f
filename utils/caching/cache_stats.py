"""How often a cache was asked and what it saved, counted over all processes that share it.

Purpose: `SharedCounts` adds up numbers in shared memory; `CacheStats` is what a user reads.
Used by: utils.caching.tensor_cache
Design notes: the numbers lie in a nameless file (memfd) that workers inherit. Counting each item in
  the parent would miss the workers' own, and a message for each would cost more than the hit.
Assistant guidance: when extending: a new number goes into COUNTED and into `CacheStats`.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from utils.caching.cache_file import FileLock
from utils.loader_utils import SharedBlock

__all__ = ["CacheStats", "SharedCounts"]

COUNTS = struct.Struct("<QQQQQd")
"""The numbers of `COUNTED`, and the seconds saved."""
COUNTED = ("hits", "misses", "refused", "damaged", "items")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts of a cache and of the workers that share it.

    Attributes
    ----------
    hits, misses
        Items that were read, and items that had to be computed.
    refused
        Items that did not fit.
    damaged
        Items whose checksum was wrong.
    items
        Items that are kept.
    bytes
        Bytes of the file in use.
    seconds_saved
        What the hits would have taken to compute, less what reading them took.
    """

    hits: int
    misses: int
    refused: int
    damaged: int
    items: int
    bytes: int
    seconds_saved: float

    def __str__(self) -> str:
        parts = [f"{self.hits} hits", f"{self.misses} misses"]
        parts += [f"{self.refused} refused"] if self.refused else []
        parts += [f"{self.damaged} damaged"] if self.damaged else []
        parts += [f"{self.bytes / 1e6:.1f} MB", f"{self.seconds_saved:.2f} s saved"]
        return ", ".join(parts)


class SharedCounts:
    """Numbers that any thread or process may add to."""

    def __init__(self) -> None:
        self.block, self._lock = SharedBlock(COUNTS.size), FileLock()

    def add(self, *, seconds: float = 0.0, **counts: int) -> None:
        """Add to the numbers of `COUNTED`, by name, and to the seconds saved."""
        # Read and written under one lock: two workers would otherwise overwrite each other's sums.
        with self._lock.hold(self.block.fd):
            former, former_seconds = self._read()
            sums = [former[name] + counts.get(name, 0) for name in COUNTED]
            os.pwrite(self.block.fd, COUNTS.pack(*sums, former_seconds + seconds), 0)

    def stats(self, used_bytes: int) -> CacheStats:
        """Return the numbers so far, of a cache whose file takes `used_bytes`."""
        counts, seconds = self._read()
        # A transform can be faster than reading its result, which saves nothing.
        return CacheStats(**counts, bytes=used_bytes, seconds_saved=max(0.0, seconds))

    def _read(self) -> tuple[dict[str, int], float]:
        *counts, seconds = COUNTS.unpack(os.pread(self.block.fd, COUNTS.size, 0))
        return dict(zip(COUNTED, counts, strict=True)), seconds
