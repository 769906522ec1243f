"""The tensor cache: what a deterministic transform made of a sample, kept after its first
computation, once for a whole node.

Purpose: `TensorCache` keeps items by sample number; `CachedDataset` puts one before a map-style
  dataset; `fingerprint` and `refuse_random` judge a transform.
Used by: benchmarks.tensor_cache, utils.caching.cached_loader, utils.caching.cached_passes
Design notes: one append-only file, without a name (memfd) or in a folder: a header, a row of 48
  bytes a sample, then the items. Spawned and forked workers read the same pages, so there is one
  copy on the node. Appends hold a kernel lock, which dies with its holder; a row is written after
  its item, so that a killed worker leaves nothing half-written. Reading takes no lock: row and item
  carry a crc32c, and what disagrees is computed again. Rule of eviction: first come, first kept; at
  the limit the newcomer goes. A pass asks for each sample once, so putting one out for another
  (LRU) would trade hits for misses and end with no hit at all.
Assistant guidance: when extending: every number in the file little-endian; raise FORMAT when its
  layout changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from utils.caching.item_codec import decode_item, encode_item
from utils.loader_utils import SharedBlock
from utils.log import get_log
from warehouse.errors import ConfigError

__all__ = ["CacheKey", "CacheStats", "CachedDataset", "TensorCache", "fingerprint", "refuse_random"]

log = get_log(__name__)
FORMAT = b"TWCACHE1"
HEAD = struct.Struct("<8s32sQQI")
"""Format, key digest, samples, end of the items; crc32c."""
ROW = struct.Struct("<QIIQIdI")
"""Offset; bytes of the header, their crc32c; bytes of header and item, their crc32c.

Seconds to compute it; crc32c of the row.
"""
HEAD_SIZE, ROW_SIZE = 64, 48
COUNTS = struct.Struct("<QQQQQd")
APPEND, COUNT = 0, 1
MOST_BUFFERS = 512
PROBES = 2
DAMAGE = (ValueError, KeyError, TypeError, IndexError, OSError, MemoryError)
"""What reading a damaged item may raise.

Not RuntimeError: PyTorch raises one wherever a process is when its DataLoader's worker dies.
"""
RANDOM_WORDS = ("random", "augment", "jitter", "noise", "mixup", "cutmix", "dropout")


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a kept item depends on. transform: a fingerprint (name and settings).

    A cache of another key is never read.
    """

    version: str
    split: str
    transform: str

    def digest(self, count: int) -> bytes:
        return hashlib.sha256(
            repr((FORMAT, self.version, self.split, self.transform, count)).encode()
        ).digest()


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Of this object and the workers it went to. refused: items that did not fit; damaged.

    Found with a wrong checksum.
    """

    hits: int
    misses: int
    refused: int
    damaged: int
    items: int
    bytes: int
    seconds_saved: float

    def __str__(self) -> str:
        extra = "".join(
            f", {value} {name}"
            for name, value in (("refused", self.refused), ("damaged", self.damaged))
            if value
        )
        return f"{self.hits} hits, {self.misses} misses{extra}, {self.bytes / 1e6:.1f} MB, {self.seconds_saved:.2f} s saved"


class TensorCache:
    """Items by number 0 <= index < count, at most limit_bytes of them with their table.

    What is handed out is a copy of one's own (see utils.caching.item_codec): contiguous, writeable,
    the same on a hit and on a miss. key, folder: keep the items between runs in
    folder/<split>-<digest>.cache; a file of another key is another file, a damaged item is computed
    again. name: of the transform, for messages; one that is random by its name, by an attribute
    `random`, or because it makes two different things of one sample (the first two items are
    computed twice), is refused with ConfigError.
    """

    def __init__(
        self,
        count: int,
        *,
        limit_bytes: int = 1 << 30,
        name: str = "items",
        transform: Any = None,
        key: CacheKey | None = None,
        folder: Path | None = None,
    ) -> None:
        self.count, self.limit, self.name = count, limit_bytes, name
        self.start = HEAD_SIZE + ROW_SIZE * count
        if count < 0 or limit_bytes < self.start:
            raise ConfigError(
                "the tensor cache's limit is smaller than its table",
                where=name,
                expected=f"at least {self.start} bytes",
                found=limit_bytes,
                remedy="raise cache_limit_mb, or switch the cache off",
            )
        refuse_random(transform)
        if (folder is None) != (key is None):
            raise ConfigError(
                "a tensor cache that is kept between runs needs both a folder and a key", where=name
            )
        self.path = (
            folder / f"{key.split}-{key.digest(count).hex()[:16]}.cache" if folder and key else None
        )
        self.digest = key.digest(count) if key else bytes(32)
        self.counts = SharedBlock(COUNTS.size)
        self.samples, self.probes, self.warned = count, PROBES, False
        self.maker: int | None = os.getpid()
        self._block = SharedBlock(self.start) if self.path is None else None
        self._open()

    def _open(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        if self._block is not None:
            self.fd = self._block.fd
        else:
            assert self.path is not None
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.fd = os.open(
                    self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
                )
            except OSError as error:
                raise ConfigError(
                    "the tensor cache's file cannot be opened",
                    where=self.path,
                    found=error.strerror,
                    remedy="choose another folder",
                ) from None
        with self._locked(APPEND):
            if self._end() is None or os.fstat(self.fd).st_size > self.limit:
                os.ftruncate(self.fd, 0)
                os.ftruncate(self.fd, self.start)
                self._set_end(self.start)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in {"_lock", "_pid", "fd"}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __del__(self) -> None:
        if getattr(self, "_block", None) is None and getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def get(self, index: int, compute: Callable[[], Any]) -> Any:
        """The item of sample `index`: kept, or computed now and kept.

        Raises IndexError, ConfigError (not cacheable, random).
        """
        row = self._row(index)
        if row is not None:
            start = time.perf_counter()
            with contextlib.suppress(*DAMAGE):
                item = self._read(row)
                self._add(hits=1, seconds=row[5] - (time.perf_counter() - start))
                return item
            self._add(damaged=1)
            self._warn("an item of the tensor cache is damaged and is computed again")
        start = time.perf_counter()
        item = compute()
        seconds = time.perf_counter() - start
        header, buffers = encode_item(item)
        if self.probes > 0:
            self.probes -= 1
            self._probe(compute, header, buffers)
        kept = self._append(index, header, buffers, seconds, former=row)
        self._add(misses=1, refused=int(not kept))
        return decode_item(header, lambda leaves: _copy(buffers, leaves))

    def put(self, index: int, item: Any, seconds: float) -> bool:
        """Keep an item that took `seconds` to compute; False when it does not fit.

        Raises ConfigError for one that cannot be kept.
        """
        kept = self._append(index, *encode_item(item), seconds, former=self._row(index))
        self._add(misses=1, refused=int(not kept))
        return kept

    def take(self, index: int, compute: Callable[[], Any]) -> Any:
        """As `get`, for an item whose miss was counted where it was computed.

        A hit is not counted again.
        """
        if self.maker is not None:
            self.announce()
        row = self._row(index)
        if row is not None:
            with contextlib.suppress(*DAMAGE):
                return self._read(row)
        return self.get(index, compute)

    def kept_rows(self) -> NDArray[np.bool_]:
        """bool [count]: whose rows are written.

        A row may still turn out to be damaged, which `get` sees to.
        """
        table = os.pread(self.fd, ROW_SIZE * self.count, HEAD_SIZE)
        rows = np.zeros((self.count, ROW_SIZE), np.uint8)
        rows.reshape(-1)[: len(table)] = np.frombuffer(table, np.uint8)
        kept: NDArray[np.bool_] = rows.max(axis=1) > 0
        return kept

    def has(self, index: int) -> bool:
        """Whether the item is kept, as far as its row tells. Raises IndexError."""
        return self._row(index) is not None

    @property
    def stats(self) -> CacheStats:
        hits, misses, refused, damaged, items, seconds = COUNTS.unpack(
            os.pread(self.counts.fd, COUNTS.size, 0)
        )
        return CacheStats(
            hits, misses, refused, damaged, items, self._end() or 0, max(0.0, seconds)
        )

    def _probe(self, compute: Callable[[], Any], header: bytes, buffers: list[memoryview]) -> None:
        again = encode_item(compute())
        if again[0] != header or any(
            bytes(one) != bytes(two) for one, two in zip(buffers, again[1], strict=True)
        ):
            raise ConfigError(
                "a transform that makes different things of one sample cannot be cached",
                where=self.name,
                remedy="cache what comes before its random part, or set cache_transformed_tensors: false",
            )

    def _row(self, index: int) -> tuple[Any, ...] | None:
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        packed = os.pread(self.fd, ROW.size, HEAD_SIZE + ROW_SIZE * index)
        if (
            len(packed) < ROW.size
            or not any(packed)
            or crc32c(packed[:-4]) != int.from_bytes(packed[-4:], "little")
        ):
            return None
        return ROW.unpack(packed)

    def _read(self, row: tuple[Any, ...]) -> Any:
        offset, head, head_crc, size, crc = row[:5]
        if not self.start <= offset <= offset + size <= os.fstat(self.fd).st_size or head > size:
            raise ValueError("outside the file")
        header = os.pread(self.fd, head, offset)
        found = crc32c(header)
        if found != head_crc:
            raise ValueError("wrong checksum")

        def fill(leaves: list[Any]) -> None:
            nonlocal found
            at = offset + head
            if sum(len(leaf) for leaf in leaves) != size - head:
                raise ValueError("header and size disagree")
            for first in range(0, len(leaves), MOST_BUFFERS):
                group = leaves[first : first + MOST_BUFFERS]
                want = sum(len(leaf) for leaf in group)
                if want and os.preadv(self.fd, group, at) != want:
                    raise ValueError("cut short")
                at += want
            for leaf in leaves:
                found = crc32c(leaf, found)
            if found != crc:
                raise ValueError("wrong checksum")

        return decode_item(header, fill)

    def _append(
        self, index: int, header: bytes, buffers: list[memoryview], seconds: float, *, former: Any
    ) -> bool:
        crc = head_crc = crc32c(header)
        for buffer in buffers:
            crc = crc32c(buffer, crc)
        size = len(header) + sum(len(buffer) for buffer in buffers)
        with self._locked(APPEND):
            if self._row(index) not in {None, former}:
                return True  # another worker was faster
            end = self._end() or self.start
            if end + size > self.limit:
                return False
            try:
                at = end
                for first in range(0, len(buffers) + 1, MOST_BUFFERS):
                    group: list[Any] = [header, *buffers][first : first + MOST_BUFFERS]
                    want = sum(len(buffer) for buffer in group)
                    if os.pwritev(self.fd, group, at) != want:
                        raise OSError(28, "short write")
                    at += want
            except OSError as error:
                self._warn(f"the tensor cache takes no more: {error.strerror}")
                return False
            self._set_end(end + size)
            body = ROW.pack(end, len(header), head_crc, size, crc, seconds, 0)[:-4]
            os.pwrite(
                self.fd, body + crc32c(body).to_bytes(4, "little"), HEAD_SIZE + ROW_SIZE * index
            )
        self._add(items=1)
        return True

    def announce(self) -> None:
        """Say once how much will be kept, going by what is.

        From the process that made the cache, for spawned ones have no log.
        """
        end = self._end()
        if self.maker != os.getpid() or end is None or end == self.start:
            return
        self.maker = None
        whole = (end - self.start) * self.count / max(1, int(self.kept_rows().sum())) + self.start
        fit = "" if whole <= self.limit else f", of which {self.limit / 1e6:.1f} MB fit"
        log.info("%s: will cache %d samples, %.1f MB%s", self.name, self.samples, whole / 1e6, fit)

    def _end(self) -> int | None:
        packed = os.pread(self.fd, HEAD.size, 0)
        if len(packed) < HEAD.size or crc32c(packed[:-4]) != int.from_bytes(packed[-4:], "little"):
            return None
        form, digest, count, end, _ = HEAD.unpack(packed)
        return (
            int(end)
            if (form, digest, count) == (FORMAT, self.digest, self.count) and end >= self.start
            else None
        )

    def _set_end(self, end: int) -> None:
        body = HEAD.pack(FORMAT, self.digest, self.count, end, 0)[:-4]
        os.pwrite(self.fd, body + crc32c(body).to_bytes(4, "little"), 0)

    def _add(
        self,
        *,
        hits: int = 0,
        misses: int = 0,
        refused: int = 0,
        damaged: int = 0,
        items: int = 0,
        seconds: float = 0.0,
    ) -> None:
        if self.maker is not None:
            self.announce()
        more = (hits, misses, refused, damaged, items, seconds)
        with self._locked(COUNT):
            was = COUNTS.unpack(os.pread(self.counts.fd, COUNTS.size, 0))
            os.pwrite(
                self.counts.fd,
                COUNTS.pack(*(one + two for one, two in zip(was, more, strict=True))),
                0,
            )

    @contextlib.contextmanager
    def _locked(self, what: int) -> Iterator[None]:
        """The kernel's lock keeps processes apart and threads not.

        A forked child must not inherit a lock that a thread held.
        """
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        fd = self.fd if what == APPEND else self.counts.fd
        with self._lock:
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
            try:
                yield
            finally:
                fcntl.lockf(fd, fcntl.LOCK_UN, 1, 0)

    def _warn(self, text: str) -> None:
        if not self.warned:
            log.warning("%s: %s", text, self.path or self.name)
        self.warned = True


class CachedDataset:
    """A map-style dataset through a cache. Workers of a DataLoader share it, spawned or forked.

    transform: what makes the dataset's items, for the refusal of random ones and for messages;
    None: the dataset itself.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        limit_bytes: int = 1 << 30,
        transform: Any = None,
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
        index = range(len(self))[index]
        return self.cache.get(index, lambda: self.dataset[index])

    def log_stats(self) -> None:
        log.info("%s cache: %s", self.cache.name, self.cache.stats)


def fingerprint(transform: Any) -> str:
    """What a CacheKey needs: the transform's own `fingerprint`, or its qualified name and settings
    (a dataclass or a pydantic model).

    Raises ConfigError for one that says neither: its name alone does not tell which settings it
    has.
    """
    own = getattr(transform, "fingerprint", None)
    if isinstance(own, str):
        return own
    kind = type(transform)
    if is_dataclass(transform) and not isinstance(transform, type):
        settings = repr(
            [(field.name, getattr(transform, field.name)) for field in fields(transform)]
        )
    elif hasattr(transform, "model_dump_json"):
        settings = transform.model_dump_json()
    else:
        raise ConfigError(
            "the transform has no fingerprint",
            where=name_of(transform),
            expected="a dataclass, a pydantic model or an attribute fingerprint",
            remedy="give it one that changes with its settings and its code",
        )
    return f"{kind.__module__}.{kind.__qualname__}({hashlib.sha256(settings.encode()).hexdigest()})"


def name_of(transform: Any) -> str:
    return str(getattr(transform, "__qualname__", None) or type(transform).__qualname__)


def refuse_random(transform: Any) -> None:
    """Raise ConfigError naming the first random part of a transform.

    By an attribute `random`, else by its name.
    """
    if transform is None:
        return
    if isinstance(transform, list | tuple):
        for part in transform:
            refuse_random(part)
        return
    said = getattr(transform, "random", None)
    name = name_of(transform)
    if said is True or (
        not isinstance(said, bool) and any(word in name.lower() for word in RANDOM_WORDS)
    ):
        raise ConfigError(
            "a random transform cannot be cached",
            where=name,
            remedy="cache what comes before it, or set "
            "cache_transformed_tensors: false; one that is not random says so with an attribute random = False",
        )
    refuse_random(getattr(transform, "transforms", None))
    refuse_random(getattr(transform, "func", None))


def _copy(buffers: list[memoryview], leaves: list[Any]) -> None:
    for buffer, leaf in zip(buffers, leaves, strict=True):
        memoryview(leaf).cast("B")[:] = buffer
