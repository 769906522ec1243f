"""The file that holds cached items: a header, a row for each sample, then the items.

Purpose: `CacheFile` appends items and reads them back, from any number of threads and processes.
Used by: utils.caching.cache_stats, utils.caching.tensor_cache
Design notes: the file only grows. It has no name (memfd) or lies in a folder. Spawned and forked
  workers read the same pages, so that there is one copy on the node. Appends hold a kernel lock,
  which dies with its holder; a row is written after its item, so that a killed worker leaves
  nothing half-written. Reading takes no lock: row and item carry a crc32c.
Assistant guidance: when extending: every number in the file is little-endian; raise FORMAT when its
  layout changes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from utils.caching.fingerprints import FORMAT
from utils.caching.item_codec import decode_item
from utils.loader_utils import SharedBlock
from warehouse.errors import ConfigError

__all__ = ["Appended", "CacheFile", "FileLock", "Row", "table_bytes"]

HEAD = struct.Struct("<8s32sQQI")
"""Format, key digest, samples, end of the items; crc32c."""
ROW = struct.Struct("<QIIQIdI")
"""Offset; bytes of the item's header, their crc32c; bytes of header and item, their crc32c.

Seconds that it took to compute the item; crc32c of the row.
"""
HEAD_SIZE, ROW_SIZE = 64, 48
MOST_BUFFERS = 512
"""Buffers of one preadv or pwritev; the kernel takes at most 1024."""

Appended = Literal["written", "present", "full"]


class Row(NamedTuple):
    """The position, size and checksums of an item; see `ROW`."""

    offset: int
    header_bytes: int
    header_crc: int
    size: int
    crc: int
    seconds: float
    row_crc: int


def table_bytes(count: int) -> int:
    """Return where the items begin: after the header and a row for each of `count` samples."""
    return HEAD_SIZE + ROW_SIZE * count


class FileLock:
    """A lock between threads and processes on a file's first byte.

    The kernel's lock keeps processes apart but not threads; the other lock does that.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[type[FileLock], tuple[()]]:
        # A threading.Lock cannot be pickled, and a spawned worker has threads of its own.
        return FileLock, ()

    @contextlib.contextmanager
    def hold(self, fd: int) -> Iterator[None]:
        """Hold the lock of the file that `fd` is open on."""
        # A forked child must not inherit a lock that one of its parent's threads held.
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()

        with self._lock:
            # lockf and not flock: a forked child shares its parent's open file, and so its flock.
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)
            try:
                yield
            finally:
                fcntl.lockf(fd, fcntl.LOCK_UN, 1, 0)


class CacheFile:
    """Encoded items by sample number, in one append-only file.

    Parameters
    ----------
    count
        The number of samples.
    limit
        The largest size of the file, in bytes.
    digest
        The digest of the key, 32 bytes. A file with another digest is emptied when it is opened.
    path
        The file's path; None keeps it in memory, for this process and its workers.

    Raises
    ------
    ConfigError
        If the file cannot be opened.
    """

    def __init__(self, count: int, limit: int, digest: bytes, path: Path | None) -> None:
        self.count, self.limit, self.digest, self.path = count, limit, digest, path
        self.start = table_bytes(count)
        self._block = SharedBlock(self.start) if path is None else None
        self._lock = FileLock()
        self._open()

    def _open(self) -> None:
        self.fd = self._open_path() if self._block is None else self._block.fd
        with self._lock.hold(self.fd):
            if self.end() is None or os.fstat(self.fd).st_size > self.limit:
                # Cut to nothing first, so that the rows grow back as zeros: as not written.
                os.ftruncate(self.fd, 0)
                os.ftruncate(self.fd, self.start)
                self._set_end(self.start)

    def _open_path(self) -> int:
        assert self.path is not None
        # A link at this predictable name could make us empty a file of the user's.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, flags, 0o644)
        except OSError as error:
            raise ConfigError(
                "the tensor cache's file cannot be opened",
                where=self.path,
                found=error.strerror,
                remedy="choose another folder",
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "fd"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __del__(self) -> None:
        # The descriptor of a file in memory belongs to its block.
        if getattr(self, "_block", None) is None and getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def row(self, index: int) -> Row | None:
        """Return the row of a sample, or None where nothing valid is written.

        Raises
        ------
        IndexError
            If there is no such sample.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} of {self.count}")
        # pread, since it moves no file position that threads and processes would share.
        packed = os.pread(self.fd, ROW.size, HEAD_SIZE + ROW_SIZE * index)
        if len(packed) < ROW.size or not any(packed):
            return None
        if crc32c(packed[:-4]) != int.from_bytes(packed[-4:], "little"):
            return None
        return Row(*ROW.unpack(packed))

    def written_rows(self) -> NDArray[np.bool_]:
        """Return which samples have a row, bool ``[count]``. A row may still be damaged."""
        table = os.pread(self.fd, ROW_SIZE * self.count, HEAD_SIZE)
        rows = np.zeros((self.count, ROW_SIZE), np.uint8)
        rows.reshape(-1)[: len(table)] = np.frombuffer(table, np.uint8)
        written: NDArray[np.bool_] = rows.max(axis=1) > 0
        return written

    def read(self, row: Row) -> Any:
        """Read and decode an item.

        Raises
        ------
        ValueError
            If the row or the item is damaged; a damaged item may raise other errors too.
        """
        end = row.offset + row.size
        if not self.start <= row.offset <= end <= os.fstat(self.fd).st_size:
            raise ValueError("outside the file")
        if row.header_bytes > row.size:
            raise ValueError("header and size disagree")

        # The header has a checksum of its own: it says how much memory to allocate, which must not
        # be taken from damaged bytes.
        header = os.pread(self.fd, row.header_bytes, row.offset)
        crc = crc32c(header)
        if crc != row.header_crc:
            raise ValueError("wrong checksum")

        def fill(leaves: list[Any]) -> None:
            self._read_into(leaves, row.offset + row.header_bytes, row.size - row.header_bytes)
            found = crc
            for leaf in leaves:
                found = crc32c(leaf, found)
            if found != row.crc:
                raise ValueError("wrong checksum")

        return decode_item(header, fill)

    def _read_into(self, leaves: list[Any], offset: int, size: int) -> None:
        if sum(len(leaf) for leaf in leaves) != size:
            raise ValueError("header and size disagree")
        for first in range(0, len(leaves), MOST_BUFFERS):
            group = leaves[first : first + MOST_BUFFERS]
            want = sum(len(leaf) for leaf in group)
            if want and os.preadv(self.fd, group, offset) != want:
                raise ValueError("cut short")
            offset += want

    def append(
        self,
        index: int,
        header: bytes,
        buffers: list[memoryview],
        seconds: float,
        former: Row | None,
    ) -> Appended:
        """Append an encoded item.

        Parameters
        ----------
        index
            The sample's number.
        header, buffers
            The item, from `encode_item`.
        seconds
            What it took to compute the item.
        former
            The damaged row that the item replaces, if any.

        Returns
        -------
        Appended
            "written"; "present" where another process was faster; "full" where it does not fit.

        Raises
        ------
        OSError
            If the file takes no more.
        """
        crc = header_crc = crc32c(header)
        for buffer in buffers:
            crc = crc32c(buffer, crc)
        size = len(header) + sum(len(buffer) for buffer in buffers)

        with self._lock.hold(self.fd):
            # Asked again under the lock: another process may have computed the same item meanwhile.
            if self.row(index) not in {None, former}:
                return "present"
            offset = self.end() or self.start
            if offset + size > self.limit:
                return "full"

            self._write_at(offset, [header, *buffers])
            # Before the row: a process killed in between wastes the item's space, whereas an end
            # that lags behind would let the next item overwrite one that has a row.
            self._set_end(offset + size)
            body = ROW.pack(offset, len(header), header_crc, size, crc, seconds, 0)[:-4]
            row = body + crc32c(body).to_bytes(4, "little")
            # The row comes last: until it is there, the item does not count.
            os.pwrite(self.fd, row, HEAD_SIZE + ROW_SIZE * index)
        return "written"

    def _write_at(self, offset: int, buffers: list[Any]) -> None:
        for first in range(0, len(buffers), MOST_BUFFERS):
            group = buffers[first : first + MOST_BUFFERS]
            want = sum(len(buffer) for buffer in group)
            if os.pwritev(self.fd, group, offset) != want:
                # A full disk or a file-size limit cuts a write short without an error.
                raise OSError(errno.ENOSPC, "short write")
            offset += want

    def end(self) -> int | None:
        """Return where the items end, or None where the header is damaged or of another key."""
        packed = os.pread(self.fd, HEAD.size, 0)
        if len(packed) < HEAD.size or crc32c(packed[:-4]) != int.from_bytes(packed[-4:], "little"):
            return None
        form, digest, count, end, _ = HEAD.unpack(packed)
        ours = (form, digest, count) == (FORMAT, self.digest, self.count)
        return int(end) if ours and end >= self.start else None

    def _set_end(self, end: int) -> None:
        body = HEAD.pack(FORMAT, self.digest, self.count, end, 0)[:-4]
        os.pwrite(self.fd, body + crc32c(body).to_bytes(4, "little"), 0)
