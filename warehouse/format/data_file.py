"""Opening a data file of a published version, and the remedy for one that is damaged.

Invariant: what is opened is a plain file below the version folder, never what a link leads to.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from warehouse.errors import CorruptError, StoreError

__all__ = ["REMEDY", "open_file"]

REMEDY = (
    "the file was changed after publishing; run python -m scripts.verify_zarr, then build again "
    "with --build.if_exists clear"
)


def open_file(path: Path) -> int:
    """Return a descriptor for reading a file of a version.

    Raises
    ------
    StoreError
        Too many files are open.
    CorruptError
        The file is missing, is a link, or cannot be opened. Names the file.
    """
    # Links are not followed, as they could lead out of the version; opening a FIFO in place of the
    # file does not wait for its writer. Windows has none of these flags.
    flags = os.O_RDONLY
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)

    try:
        return os.open(path, flags)
    except OSError as error:
        # The file is in order then: rebuilding the version would not help.
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise StoreError(
                "too many open files",
                where=path,
                remedy="raise the limit with ulimit -n, or lower --loader.interleave",
            ) from None
        raise CorruptError(
            "a data file is missing or cannot be opened",
            where=path,
            found=error.strerror,
            remedy=REMEDY,
        ) from None
