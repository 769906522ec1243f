"""sha256 of source files, remembered between runs so that rebuilding unchanged data is quick.

A hash is remembered by (device, inode, size, mtime_ns) outside any version, in the user's cache
folder. A file touched within the last two seconds is hashed but not remembered: its time stamp
would not show the next change. A cache that cannot be read or written costs time, never a build.
A change that keeps size and time stamp is noticed with `rehash` only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from warehouse.errors import SourceError

__all__ = ["cache_path", "hash_files"]

log = logging.getLogger(__name__)
FRESH_NS = 2_000_000_000
"""A file modified within so many nanoseconds is not remembered."""
Key = tuple[int, int, int, int]
"""Device, inode, size and time of modification in nanoseconds."""
RECALL = "SELECT sha256 FROM hashes WHERE device=? AND inode=? AND size=? AND mtime_ns=?"


def cache_path() -> Path:
    """Return the file that holds the hashes, below `$XDG_CACHE_HOME` or else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "tensor-warehouse" / "hashes.sqlite"


def hash_files(
    files: Sequence[tuple[Path, os.stat_result]],
    *,
    rehash: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Hash files, or recall their hashes.

    Parameters
    ----------
    files
        Path and result of `os.stat` of each file.
    rehash
        Whether to read every file, also those whose hash is known.
    progress
        Called with numbers of files that are done.

    Returns
    -------
    list
        The sha256 of each file, as hexadecimal digits, in the same order.

    Raises
    ------
    SourceError
        For a file that cannot be read, or that changes while it is read.
    """
    # SQLite integers are signed 64 bit; device and inode numbers may use all of them.
    keys: list[Key] = [
        (_signed(stat.st_dev), _signed(stat.st_ino), stat.st_size, stat.st_mtime_ns)
        for _, stat in files
    ]
    known: dict[Key, str] = {} if rehash else _recall(keys)
    todo = [at for at, key in enumerate(keys) if key not in known]
    if progress is not None and len(files) > len(todo):
        progress(len(files) - len(todo))

    def hash_one(at: int) -> str:
        digest = _hash(*files[at])
        if progress is not None:
            progress(1)
        return digest

    # hashlib releases the GIL, and slow disks answer several requests at once.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        fresh = dict(zip(todo, pool.map(hash_one, todo), strict=True))

    # Some file systems count time in steps of up to two seconds: a change within the same step
    # would leave the key as it is.
    horizon = time.time_ns() - FRESH_NS
    _remember(
        [(*keys[at], digest) for at, digest in fresh.items() if files[at][1].st_mtime_ns < horizon]
    )
    return [fresh[at] if at in fresh else known[key] for at, key in enumerate(keys)]


def _signed(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _hash(path: Path, before: os.stat_result) -> str:
    try:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise SourceError(
            "a source file cannot be read",
            where=path,
            found=error.strerror,
            remedy="check its permissions",
        ) from None
    # A digest of two halves of different files would be remembered under the key of the new one.
    if _identity(after) != _identity(before):
        raise SourceError(
            "a source file changed while it was read",
            where=path,
            remedy="run the same command again once nothing writes there",
        )
    return digest


def _identity(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _open() -> sqlite3.Connection:
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=5)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS hashes"
        " (device INTEGER, inode INTEGER, size INTEGER, mtime_ns INTEGER, sha256 TEXT,"
        " PRIMARY KEY (device, inode, size, mtime_ns)) WITHOUT ROWID"
    )
    return connection


def _recall(keys: Sequence[Key]) -> dict[Key, str]:
    known: dict[Key, str] = {}
    try:
        with closing(_open()) as connection:
            for key in keys:
                row = connection.execute(RECALL, key).fetchone()
                # The file lies in the user's cache, where anything may have written to it.
                if row is not None and isinstance(row[0], str) and len(row[0]) == 64:
                    known[key] = row[0]
    except (sqlite3.Error, OSError) as error:
        log.warning(
            "the cache of source hashes cannot be read (%s: %s): every file is hashed again",
            cache_path(),
            error,
        )
        return {}
    return known


def _remember(rows: Sequence[tuple[int, int, int, int, str]]) -> None:
    if not rows:
        return
    try:
        with closing(_open()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", rows)
    except (sqlite3.Error, OSError) as error:
        log.warning(
            "the cache of source hashes cannot be written (%s: %s): the next build hashes every"
            " file again",
            cache_path(),
            error,
        )
