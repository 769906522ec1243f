"""Writing a stored chunk: its inner chunks one after another, then their index.

A stored chunk of a sharded array is `inner chunk ... | index | crc32c(index)`, as Zarr's
`sharding_indexed` writes it: the index holds little-endian uint64 (offset, length) pairs, both
2^64-1 where an inner chunk is absent. The seal of a file is the crc32c of all its inner checksums
and its index: files.parquet keeps it, so that a file swapped for another valid one is noticed when
it is opened, without hashing it. Given up: Zarr features that we do not write (nested shards, an
index at the start). Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from crc32c import crc32c

from warehouse.format.inner_chunks import CRC

__all__ = ["ABSENT", "ShardWriter", "Writable", "seal_of"]

ABSENT = 2**64 - 1
"""Offset and length of an inner chunk that is not there, as the specification has them."""


def seal_of(checksums: bytes, index: bytes) -> int:
    """Return the seal of a file.

    Parameters
    ----------
    checksums
        The crc32c of each inner chunk that is there, 4 bytes each, in the order of the index.
    index
        The index without its own crc32c.
    """
    # Checksums alone are not enough: two files of equal size that were swapped passed all of
    # Zarr's, and so did two entries of an index that were exchanged and the index's crc32c mended.
    return int(crc32c(index, crc32c(checksums)))


class Writable(Protocol):
    """What a shard is written to, such as an open file or a `DurableFile`."""

    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Writes one stored chunk of a sharded array, inner chunk by inner chunk, into an open file.

    No more than one encoded inner chunk is held in memory.

    Parameters
    ----------
    file
        Where the bytes go.
    slots
        Number of inner chunks that the stored chunk has room for.
    """

    def __init__(self, file: Writable, slots: int) -> None:
        self.file = file
        self.index = np.full((slots, 2), ABSENT, dtype="<u8")
        self.checksums: list[bytes] = []
        self.offset = 0

    def append(self, encoded: bytes, slot: int | None = None) -> None:
        """Write an inner chunk.

        Parameters
        ----------
        encoded
            The inner chunk, which ends with its crc32c.
        slot
            Its position in the index, higher than those before; the next one if None.
        """
        self.file.write(encoded)
        at = len(self.checksums) if slot is None else slot
        self.index[at] = self.offset, len(encoded)
        # Ascending positions matter here: readers compute the seal in the order of the index.
        self.checksums.append(encoded[-4:])
        self.offset += len(encoded)

    def finish(self) -> int:
        """Write the index and return the seal of the file."""
        # At the end, where its offsets are known: nothing has to be written twice.
        body = self.index.tobytes()
        self.file.write(body + CRC.pack(crc32c(body)))
        return seal_of(b"".join(self.checksums), body)
