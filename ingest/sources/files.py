"""Files below the input root: finding them and reading them, and nothing outside the root.

The walk is what the version key stands on, so it must be complete and quick: 2,000 files that were
hashed before take a fraction of a second. Hidden files, `__MACOSX`, the segmentation masks of
Pascal VOC and the output root are not sources. A link that leads out of the root is refused,
because a downloaded data set must not be able to pull in other files of the machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from warehouse.errors import SourceError
from warehouse.settings import BuildSettings

__all__ = [
    "PICTURE_EXTENSIONS",
    "input_root",
    "path_inside",
    "read_ends",
    "read_inside",
    "walk_sources",
]

log = logging.getLogger(__name__)
PICTURE_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
SKIPPED_FOLDERS = frozenset({"__MACOSX", "SegmentationClass", "SegmentationObject"})


def input_root(settings: BuildSettings) -> Path:
    """Return the folder that `build.input_root` names.

    Raises
    ------
    SourceError
        If no folder is given, or if it does not exist or is a file.
    """
    if not settings.input_root:
        raise SourceError(
            "no input folder given",
            remedy=(
                "add --build.input_root FOLDER, or make a sample with python -m scripts.make_sample"
            ),
        )
    root = Path(settings.input_root).expanduser()
    if not root.exists():
        raise SourceError(
            "the input folder does not exist", where=root, remedy="check --build.input_root"
        )
    if not root.is_dir():
        raise SourceError(
            "the input is a file, not a folder",
            where=root,
            remedy="point --build.input_root at the folder that holds it",
        )
    return root


def walk_sources(root: Path, output_root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Walk an input root.

    Parameters
    ----------
    root
        The input root.
    output_root
        The warehouse, which is left out where it lies below the root.

    Yields
    ------
    tuple
        The POSIX path relative to the root, and the result of `os.stat`, of every regular file
        that may be a source.

    Raises
    ------
    SourceError
        For a folder that cannot be read, a file name that is not UTF-8, a link out of the root or
        to nowhere, and a picture that is not a regular file.
    """
    # Resolved once, since links are compared with them: the root itself may be a link.
    real_root = os.path.realpath(root)
    real_output = os.path.realpath(output_root)

    for folder, folders, names in os.walk(root, onerror=_refuse_folder):
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        _prune(folder, folders, prefix, real_root, real_output)
        for name in names:
            # macOS leaves `._a.jpg` beside every `a.jpg` on foreign disks: no image, its extension.
            if name.startswith("."):
                continue
            info = _stat_of(folder, name, prefix, real_root)
            if stat.S_ISREG(info.st_mode):
                yield prefix + name, info
            # Opening a pipe would wait for ever. Under other names it is none of our business.
            elif name.lower().endswith(PICTURE_EXTENSIONS):
                raise SourceError(
                    "a source is not a regular file",
                    where=prefix + name,
                    remedy="remove it from the input folder",
                )


def _refuse_folder(error: OSError) -> None:
    raise SourceError(
        "a source folder cannot be read",
        where=error.filename,
        found=error.strerror,
        remedy="check its permissions",
    )


def _prune(folder: str, folders: list[str], prefix: str, real_root: str, real_output: str) -> None:
    """Remove from `folders`, which os.walk follows, what it is not to follow, and sort the rest."""
    for name in list(folders):
        full = os.path.join(folder, name)
        skipped = name.startswith(".") or name in SKIPPED_FOLDERS
        if skipped or os.path.realpath(full) == real_output:
            folders.remove(name)
        # Two links to each other would be walked for ever.
        elif os.path.islink(full):
            folders.remove(name)
            _check_link(full, real_root)
            log.warning("a linked folder is not followed: %s%s", prefix, name)
    folders.sort()


def _stat_of(folder: str, name: str, prefix: str, real_root: str) -> os.stat_result:
    full = os.path.join(folder, name)
    # Linux allows any bytes in a name; the manifest and its fingerprint are UTF-8.
    try:
        (prefix + name).encode()
    except UnicodeEncodeError:
        raise SourceError(
            "a file name is not valid UTF-8",
            where=repr(prefix + name),
            remedy="rename the file",
        ) from None
    info = os.lstat(full)
    if not stat.S_ISLNK(info.st_mode):
        return info
    _check_link(full, real_root)
    return os.stat(full)


def _check_link(full: str, real_root: str) -> None:
    real = os.path.realpath(full)
    if not os.path.exists(real):
        raise SourceError(
            "a link leads nowhere", where=full, remedy="remove it from the input folder"
        )
    if os.path.commonpath([real, real_root]) != real_root:
        raise SourceError(
            "a link leads out of the input folder",
            where=full,
            found=real,
            remedy="copy what it points to into the folder",
        )


def path_inside(root: Path, path: str) -> str:
    """Return the absolute path of a file below a root, with links resolved.

    Raises
    ------
    SourceError
        If the path leads out of the root.
    """
    # Paths may come from an annotation file, that is from whoever made the data set.
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise SourceError("a path leads out of the input folder", where=repr(path))

    real_root = _real_root(os.path.abspath(root))
    target = os.path.join(real_root, path)
    parts = path.split("/")
    linked = any(
        os.path.islink(os.path.join(real_root, *parts[:count]))
        for count in range(1, len(parts) + 1)
    )
    # Nearly every path is of this kind, and resolving it would cost several system calls.
    if not linked:
        return target
    real = os.path.realpath(target)
    if os.path.commonpath([real, real_root]) != real_root:
        raise SourceError("a link leads out of the input folder", where=target, found=real)
    return real


@lru_cache(maxsize=16)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def read_inside(root: Path, path: str, *, limit: int, sha256: str | None = None) -> bytes:
    """Read a whole file below a root.

    Parameters
    ----------
    limit
        The largest size in bytes.
    sha256
        The digest that the file had when it was listed, as hexadecimal digits; None skips the
        check.

    Raises
    ------
    SourceError
        If the file lies outside the root, cannot be read, is too large, or has changed.
    """
    target = path_inside(root, path)
    try:
        with open(target, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise SourceError(
                    "a source file is too large",
                    where=path,
                    expected=f"at most {limit} bytes",
                    found=f"{size} bytes",
                )
            data = file.readall()
    except OSError as error:
        raise SourceError(
            "a source file cannot be read", where=path, found=error.strerror
        ) from None
    # The version is named by the listed digests, so it must be made of the bytes that were hashed.
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise SourceError(
            "a source file changed while being built",
            where=path,
            remedy=("run the same command again; if the message stays, add --build.rehash true"),
        )
    return data


def read_ends(root: Path, path: str, *, head: int, tail: int) -> tuple[bytes, bytes, bool]:
    """Read the two ends of a file below a root.

    Parameters
    ----------
    head, tail
        Largest numbers of bytes to read from the start and from the end.

    Returns
    -------
    tuple
        The first bytes, the last bytes, and whether the first bytes are the whole file.

    Raises
    ------
    SourceError
        If the file lies outside the root or cannot be read.
    """
    try:
        with open(path_inside(root, path), "rb", buffering=0) as file:
            first = file.read(head)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - tail))
            return first, file.read(tail), len(first) == size
    except OSError as error:
        raise SourceError(
            "a source file cannot be read", where=path, found=error.strerror
        ) from None
