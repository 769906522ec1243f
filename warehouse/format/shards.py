"""Writing a stored chunk: inner chunks one after another, then their index.

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
"""Offset and length of an inner chunk that is not there."""


def seal_of(checksums: bytes, index: bytes) -> int:
    return int(crc32c(index, crc32c(checksums)))


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Writes one stored chunk of a sharded array, inner chunk by inner chunk, into an open file.
    Memory: one encoded inner chunk.

    slots: inner chunks it has room for.
    """

    def __init__(self, file: Writable, slots: int) -> None:
        self.file = file
        self.index = np.full((slots, 2), ABSENT, dtype="<u8")
        self.checksums: list[bytes] = []
        self.offset = 0

    def append(self, encoded: bytes, slot: int | None = None) -> None:
        """slot: where the inner chunk stands in the index, ascending; the next one unless given."""
        self.file.write(encoded)
        self.index[len(self.checksums) if slot is None else slot] = self.offset, len(encoded)
        self.checksums.append(encoded[-4:])
        self.offset += len(encoded)

    def finish(self) -> int:
        """Write the index; returns the file's seal."""
        body = self.index.tobytes()
        self.file.write(body + CRC.pack(crc32c(body)))
        return seal_of(b"".join(self.checksums), body)
