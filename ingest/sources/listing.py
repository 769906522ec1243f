"""The input as it was found: which files belong to it, and the fingerprint of all of them.

The fingerprint is part of a version's name, so it depends on names and contents only: never on the
root, on time stamps, or on the order in which the file system lists a folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

__all__ = ["SourceFile", "SourceListing", "hash_sources"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a build depends on.

    Attributes
    ----------
    path
        POSIX path relative to the input root.
    size
        Size in bytes when the file was listed.
    mtime_ns
        Time of the last modification, in nanoseconds.
    inode
        Number of the inode.
    sha256
        Digest of the content, as hexadecimal digits.
    """

    path: str
    # Size, time and inode are for noticing changes during a build; the fingerprint leaves them out.
    size: int
    mtime_ns: int
    inode: int
    sha256: str


@dataclass(frozen=True)
class SourceListing:
    """Everything below an input root that a build reads.

    Attributes
    ----------
    root
        The input root.
    format
        Name of the annotation format, or `raster`.
    pictures
        Images or rasters, as sorted POSIX paths relative to the root.
    annotations
        Annotation files, likewise.
    files
        All files that were hashed: pictures, annotations, and files such as lists of class names.
    warnings
        Remarks for the user, one line each.
    """

    root: Path
    format: str
    pictures: tuple[str, ...]
    annotations: tuple[str, ...]
    files: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = field(default=())

    # Looked up for every picture; a search in the list would be quadratic.
    @cached_property
    def _by_path(self) -> dict[str, SourceFile]:
        return {file.path: file for file in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hexadecimal) of the format and of every file's name and content."""
        # No file name holds a zero byte, so two different listings never hash the same bytes.
        digest = hashlib.sha256(f"{self.format}\0".encode())
        for file in sorted(self.files, key=lambda file: file.path):
            digest.update(f"{file.path}\0{file.sha256}\0".encode())
        return digest.hexdigest()

    def sha256_of(self, path: str) -> str:
        """Return the sha256 of a listed file, as hexadecimal digits."""
        return self._by_path[path].sha256

    def others(self) -> tuple[str, ...]:
        """Return the files that are neither pictures nor annotations: lists of class names."""
        own = {*self.pictures, *self.annotations}
        return tuple(sorted(file.path for file in self.files if file.path not in own))


def hash_sources(
    root: Path,
    paths: Sequence[str],
    stats: Mapping[str, os.stat_result],
    *,
    rehash: bool,
    progress: Callable[[int], None] | None = None,
) -> tuple[SourceFile, ...]:
    """Hash the files of a listing.

    Parameters
    ----------
    root
        The input root.
    paths
        The files, as POSIX paths relative to the root.
    stats
        The result of `os.stat` for each path.
    rehash
        Whether to read files again whose digest is known by size, time and inode.
    progress
        Called with numbers of files that are done.

    Raises
    ------
    SourceError
        For a file that cannot be read or that changes while it is read.
    """
    # SQLite takes time to import, and whoever only reads a listing does not need it.
    from ingest.sources.hashes import hash_files

    pairs = [(root / path, stats[path]) for path in paths]
    digests = hash_files(pairs, rehash=rehash, progress=progress)
    return tuple(
        SourceFile(path, stat.st_size, stat.st_mtime_ns, stat.st_ino, digest)
        for path, (_, stat), digest in zip(paths, pairs, digests, strict=True)
    )
