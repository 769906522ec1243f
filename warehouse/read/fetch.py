"""Read the whole file of a stored chunk into memory that its caller provides.

The memory is reused from chunk to chunk and may be shared by processes, so that nothing is
allocated or copied here. What is read is not decoded: the crc32c of each sample is compared later.
"""

from __future__ import annotations

import os
from pathlib import Path

from warehouse.errors import CorruptError
from warehouse.format.data_file import REMEDY, open_file
from warehouse.format.location import Location, Remote

__all__ = ["fetch"]


def fetch(path: Location, memory: memoryview) -> None:
    """Read the whole file of a stored chunk into memory, from a disk or from an object store.

    Parameters
    ----------
    path
        The file.
    memory
        The memory to fill, as long as the published size.

    Raises
    ------
    CorruptError
        If the file has another size.
    """
    if isinstance(path, Remote):
        path.read_into(memory)
    else:
        read_whole(path, memory)


def read_whole(path: Path, memory: memoryview) -> None:
    """Read a whole local file into memory, as `fetch` does."""
    fd = open_file(path)
    try:
        found = os.fstat(fd).st_size
        at = 0
        # preadv may read less than it is asked for, and into `memory` directly, without a copy.
        while found == len(memory) and at < len(memory):
            count = os.preadv(fd, [memory[at:]], at)
            # The file was cut short since its size was read.
            if count == 0:
                break
            at += count
        if at != len(memory) or not at:
            raise CorruptError(
                "a data file has the wrong size",
                where=path,
                expected=f"{len(memory)} bytes",
                found=found,
                remedy=REMEDY,
            )
    except OSError as error:
        raise CorruptError(
            "a data file cannot be read", where=path, found=error.strerror, remedy=REMEDY
        ) from None
    finally:
        os.close(fd)
