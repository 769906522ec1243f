"""Files that survive a power cut, and the lock of a version being built.

Every write goes to a temporary name in the same folder, is fsynced, renamed, and its folder
fsynced: after a crash a name holds the whole new content or the whole old one. Zarr's own
LocalStore renames but never fsyncs.
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
    """A file being written under a temporary name; `commit` makes it durable under its own.

    Counts bytes, hashes them on the way.
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
        self.hash.update(data)
        self.size += len(data)
        return self.file.write(data)

    def commit(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temp, self.path)

    def discard(self) -> None:
        self.file.close()
        self.temp.unlink(missing_ok=True)


@contextlib.contextmanager
def durable(path: Path) -> Iterator[DurableFile]:
    """A DurableFile committed at the end of the block, discarded when the block raises."""
    file = DurableFile(path)
    try:
        yield file
        file.commit()
    except BaseException:
        file.discard()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably, folder included."""
    with durable(path) as file:
        file.write(data)
    fsync_folder(path.parent)


def replace(source: Path, target: Path) -> None:
    """Rename and make the rename durable."""
    os.replace(source, target)
    fsync_folder(target.parent)


def exchange(one: Path, other: Path) -> None:
    """Swap two folders of one file system so that both names hold something at every moment, where
    the kernel can (Linux).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    swap = getattr(libc, "renameat2", None)
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap is None or swap(here, os.fsencode(one), here, os.fsencode(other), both) != 0:
        aside = other.with_name(other.name + TEMP_SUFFIX)
        os.replace(other, aside)
        os.replace(one, other)
        os.replace(aside, one)
    fsync_folder(other.parent)


def fsync_folder(path: Path) -> None:
    if sys.platform == "win32":
        return  # NTFS has no way to open a folder for fsync
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make every folder entry below `root` durable.

    Files are fsynced when written, except zarr.json, fsynced here.
    """
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            if name == "zarr.json":
                fd = os.open(os.path.join(folder, name), os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        fsync_folder(Path(folder))


def remove_tree(path: Path) -> None:
    """Delete a folder of ours; a missing one is fine."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


@contextlib.contextmanager
def lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` or, after `wait_s`, raise LockedError naming the holder.

    The kernel frees a killed process's lock.
    """
    if sys.platform == "win32":  # one builder at a time is then the user's care, as the README says
        yield
        return
    deadline = time.monotonic() + wait_s
    while True:
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
    return shutil.disk_usage(path).free
