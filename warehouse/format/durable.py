"""Files that survive a power cut, and the lock of a version that is being built.

Every write goes to a temporary name in the same folder, which is fsynced and renamed, and then the
folder is fsynced. Invariant: after a crash, a name holds all of the new content or all of the old
one. Zarr's own LocalStore renames files but never fsyncs. Given up: on Windows there is neither an
fsync of folders nor a lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from warehouse.errors import LockedError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "DurableFile",
    "exchange",
    "fsync_folder",
    "fsync_tree",
    "lock",
    "remove_tree",
    "replace",
    "write_bytes",
]

TEMP_SUFFIX = ".part"


class DurableFile:
    """A file that is written under a temporary name until `commit` gives it its own.

    Attributes
    ----------
    hash
        sha256 of what was written so far.
    size
        Bytes that were written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # A name of its own: a task of a killed cluster job may still be writing the same chunk.
        self.temp = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMP_SUFFIX}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = open(self.temp, "wb")  # noqa: SIM115 - closed by commit or discard
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Append to the file; its hash and size go along."""
        # Hashed on the way: reading the file back for its sha256 would cost as much as writing it.
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def commit(self) -> None:
        """Give the file its own name. The folder has to be fsynced by the caller."""
        # The rename after the fsync: the other way round, a crash could leave the name without
        # the content.
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temp, self.path)

    def discard(self) -> None:
        """Close and delete the temporary file."""
        self.file.close()
        self.temp.unlink(missing_ok=True)


@contextlib.contextmanager
def durable(path: Path) -> Iterator[DurableFile]:
    """Yield a DurableFile; commit it at the end of the block, discard it if the block raises."""
    file = DurableFile(path)
    try:
        yield file
        file.commit()
    # Ctrl-C too must not leave a temporary file in a version's folder.
    except BaseException:
        file.discard()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data`, durably, and fsync its folder."""
    with durable(path) as file:
        file.write(data)
    fsync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename `source` to `target` and make that durable."""
    os.replace(source, target)
    fsync_folder(target.parent)


def exchange(one: Path, other: Path) -> None:
    """Swap two folders of one file system.

    On Linux, both names hold a folder at every moment. Elsewhere, `other` is missing for a moment.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # A C library older than glibc 2.28 does not have it, nor has any other system.
    swap = getattr(libc, "renameat2", None)
    # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <stdio.h>.
    here, both = -100, 2

    # The call can also fail, as some file systems cannot exchange names.
    if swap is None or swap(here, os.fsencode(one), here, os.fsencode(other), both) != 0:
        aside = other.with_name(other.name + TEMP_SUFFIX)
        os.replace(other, aside)
        os.replace(one, other)
        os.replace(aside, one)
    fsync_folder(other.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; does nothing on Windows."""
    # Windows has no way to open a folder for an fsync.
    if sys.platform == "win32":
        return

    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make all names below `root` durable, and the contents of the zarr.json files."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            # All other files were fsynced when they were written; these are zarr-python's.
            if name == "zarr.json":
                fd = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        fsync_folder(Path(folder))


def remove_tree(path: Path) -> None:
    """Delete a folder with everything in it; nothing happens if it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` during the block. Does nothing on Windows.

    Parameters
    ----------
    wait_s
        For how long to wait for a lock that another process holds.

    Raises
    ------
    LockedError
        Another process still holds the lock after `wait_s`; the message names the process.
    """
    # Windows has no flock: there, the user has to start one build at a time, as the README says.
    if sys.platform == "win32":
        yield
        return

    # The kernel frees the lock of a killed process, so that no build ever meets a stale one.
    deadline = time.monotonic() + wait_s
    while True:
        # A link could make us truncate any file that the user can write.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() < deadline:
                os.close(fd)
                time.sleep(0.01)
                continue
            holder = os.read(fd, 64).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise LockedError(
                "another build of this version is running",
                where=path,
                found=f"process {holder}",
                remedy="wait for it to end, then run the same command again",
            ) from None
        # The former holder may have unlinked the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(fd), os.stat(path)):
            break
        os.close(fd)

    try:
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that `path` lies in."""
    return shutil.disk_usage(path).free
