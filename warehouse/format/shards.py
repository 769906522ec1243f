"""Inner chunks and stored chunks as bytes: the only code that encodes and decodes samples.

A stored chunk of a sharded array is `inner chunk ... | index | crc32c(index)`, as Zarr's
`sharding_indexed` writes it: the index holds little-endian uint64 (offset, length) pairs, both
2^64-1 where an inner chunk is absent. An inner chunk, and a whole file of a plain array, is
`blosc(bytes) | crc32c`. Invariant: no byte is handed out whose crc32c, Blosc header size and place
in the `seal` disagree. The seal of a file is the crc32c of all its inner checksums and its index:
files.parquet keeps it, so that a file swapped for another valid one is noticed when it is opened,
without hashing it. Given up: Zarr features we do not write (nested shards, other codecs, index at
the start): `foreign` tells, library.py reads them. Format:
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from crc32c import crc32c
from numcodecs import blosc
from numpy.typing import NDArray

from warehouse.errors import CorruptError, StoreError
from warehouse.format.location import Location
from warehouse.format.schema import ArraySpec, Codec

__all__ = [
    "ShardWriter",
    "StoredChunk",
    "decode_into",
    "encode",
    "fill_value",
    "foreign",
    "open_file",
    "parts_of",
]

# Threaded Blosc holds the GIL, and its output depends on the thread count: 40 different outputs in
# 40 encodes were seen.
blosc.use_threads = False

ABSENT = 2**64 - 1
_CRC = struct.Struct("<I")
_BLOSC_SIZES = struct.Struct("<III")
REMEDY = "the file was changed after publishing; run python -m scripts.verify_zarr, then build again with --build.if_exists clear"


def fill_value(spec: ArraySpec) -> Any:
    """What stands in padded places of a last, short stored chunk.

    NaN in cubes, where it means missing.
    """
    if spec.name == "data":
        return float("nan")
    return -1 if spec.name == "label" else np.dtype(spec.dtype).type(0).item()


def encode(array: NDArray[Any], codec: Codec) -> bytes:
    """The codecs of one inner chunk over a C-contiguous array.

    Little-endian bytes, Blosc unless cname is None, crc32c.
    """
    source = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    if codec.cname is None:
        body = source.tobytes()
    else:
        body = blosc.compress(
            source,
            codec.cname.encode(),
            codec.clevel,
            int(codec.shuffle),
            codec.blocksize,
            codec.typesize,
        )
    return body + _CRC.pack(crc32c(body))


def decode_into(source: memoryview, out: NDArray[Any], codec: Codec, check: bool) -> None:
    """Decode one inner chunk straight into `out` (C-contiguous). Raises ValueError(reason) before
    writing if anything is off.

    The header is compared with `out` first: a chunk that holds fewer bytes decodes without
    complaint and leaves the row's old tail.
    """
    end = len(source) - 4
    body = source[:end]
    if check and crc32c(body) != _CRC.unpack_from(source, end)[0]:
        raise ValueError("crc32c mismatch")
    if codec.cname is None:
        if end != out.nbytes:
            raise ValueError(f"inner chunk holds {end} bytes instead of {out.nbytes}")
        out.view(np.uint8).reshape(-1)[:] = np.frombuffer(body, np.uint8)
        return
    if end < 16:
        raise ValueError("inner chunk is shorter than a Blosc header")
    size, _, packed = _BLOSC_SIZES.unpack_from(source, 4)
    if size != out.nbytes or packed != end:
        raise ValueError(
            f"Blosc header says {size} bytes in {packed}, expected {out.nbytes} in {end}"
        )
    blosc.decompress(body, out)


def seal_of(checksums: bytes, index: bytes) -> int:
    return int(crc32c(index, crc32c(checksums)))


class Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


def parts_of(row: NDArray[Any], spec: ArraySpec) -> list[NDArray[Any]]:
    """A sample as the inner chunks it is stored as, in order.

    The last one is filled up with the fill value.
    """
    if spec.parts == 1:
        return [row]
    assert spec.inner is not None
    width = spec.inner[-1]
    room = np.full((*row.shape[:-1], spec.parts * width), fill_value(spec), row.dtype)
    room[..., : row.shape[-1]] = row
    return [
        np.ascontiguousarray(room[..., at * width : (at + 1) * width]) for at in range(spec.parts)
    ]


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
        self.file.write(body + _CRC.pack(crc32c(body)))
        return seal_of(b"".join(self.checksums), body)


def open_file(path: Path) -> int:
    """A descriptor for reading; links are not followed, a FIFO does not hang.

    Raises CorruptError naming the file.
    """
    try:
        return os.open(
            path,
            os.O_RDONLY
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_NONBLOCK", 0),
        )
    except OSError as error:
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


class StoredChunk:
    """One file of an array: mapped, read with `pread`, or held in memory. Rows are decoded from it
    in any order, by any thread.

    A row is a sample: one inner chunk, or spec.parts of them in a row, which `index` then holds one
    after the other. expected: (size, seal) from files.parquet. rows: how many samples are in this
    chunk, or which slots; the others are absent. memory: the whole file, when it was fetched
    already. Opening checks the size, the index's crc32c, every index entry and the seal; raises
    CorruptError naming the file.
    """

    def __init__(
        self,
        path: Location,
        spec: ArraySpec,
        rows: int | NDArray[np.int64],
        expected: tuple[int, int],
        access: str = "mmap",
        memory: memoryview | None = None,
    ) -> None:
        self.path, self.spec, self.size = path, spec, expected[0]
        self.present = np.arange(rows) if isinstance(rows, int) else rows
        self.rows, self.parts = int(self.present[-1]) + 1, spec.parts
        self.view: memoryview | None = memory
        self.verified = bytearray(self.rows)
        self.decoded: NDArray[Any] | None = None
        self.fd = -1
        try:
            if memory is None:
                assert isinstance(path, Path), "what is not a local file is fetched first"
                self.fd = open_file(path)
                self.check_size()
                if access == "mmap":
                    self.view = memoryview(mmap.mmap(self.fd, self.size, access=mmap.ACCESS_READ))
            self.index = self._open_index(expected[1])
        except BaseException:
            self.close()
            raise

    def check_size(self) -> None:
        """Compare the file's size with the published one.

        Before touching a map: reading past a truncated file's end is SIGBUS.
        """
        if self.fd < 0:
            return
        size = os.fstat(self.fd).st_size
        if size != self.size or self.size == 0:
            raise CorruptError(
                "a data file has the wrong size",
                where=self.path,
                expected=f"{self.size} bytes",
                found=size,
                remedy=REMEDY,
            )

    def _open_index(self, seal: int) -> list[tuple[int, int]]:
        if self.spec.inner is None:
            if self.size < 4 or _CRC.unpack(self._bytes(self.size - 4, 4))[0] != seal:
                raise CorruptError(
                    "a data file is not the one that was published",
                    where=self.path,
                    expected=f"seal {seal:08x}",
                    remedy=REMEDY,
                )
            return [(0, self.size)]
        slots = self.spec.chunk[0] * self.parts
        present = (
            self.present
            if self.parts == 1
            else (self.present[:, None] * self.parts + np.arange(self.parts)).reshape(-1)
        )
        tail = 16 * slots + 4
        if self.size < tail:
            raise CorruptError(
                "a stored chunk is shorter than its index",
                where=self.path,
                expected=f"{tail} bytes",
                found=self.size,
                remedy=REMEDY,
            )
        body = bytes(self._bytes(self.size - tail, tail))
        if crc32c(body[:-4]) != _CRC.unpack(body[-4:])[0]:
            raise CorruptError("a shard index fails its crc32c", where=self.path, remedy=REMEDY)
        index = np.frombuffer(body[:-4], "<u8").reshape(slots, 2)
        live = index[present]
        data = self.size - tail
        inside = (
            (live[:, 1] >= 4)
            & (live[:, 1] <= data)
            & (live[:, 0] <= data - np.minimum(live[:, 1], data))
        )
        absent = (index == ABSENT).all(axis=1)
        absent[present] = True
        if not inside.all() or not absent.all():
            at = int(present[np.argmin(inside)] if not inside.all() else np.argmin(absent))
            raise CorruptError(
                "a shard index entry is absent or outside the file",
                where=f"{self.path}, inner chunk {at}",
                remedy=REMEDY,
            )
        entries = [(int(offset), int(length)) for offset, length in live.tolist()]
        checksums = b"".join(
            bytes(self._bytes(offset + length - 4, 4)) for offset, length in entries
        )
        if seal_of(checksums, body[:-4]) != seal:
            raise CorruptError(
                "a stored chunk is not the one that was published",
                where=self.path,
                expected=f"seal {seal:08x}",
                remedy=REMEDY,
            )
        if len(entries) == self.rows * self.parts:
            return entries
        # At their slots; absent ones, which no sample leads to, are empty.
        table = [(0, 0)] * (self.rows * self.parts)
        for slot, entry in zip(present.tolist(), entries, strict=True):
            table[slot] = entry
        return table

    def _bytes(self, offset: int, length: int) -> memoryview:
        if self.view is not None:
            return self.view[offset : offset + length]
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise CorruptError(
                "a data file cannot be read", where=self.path, found=error.strerror, remedy=REMEDY
            ) from None
        if len(data) != length:
            raise CorruptError(
                "a data file ends early",
                where=self.path,
                expected=f"{offset + length} bytes",
                found=offset + len(data),
                remedy=REMEDY,
            )
        return memoryview(data)

    def read_row(self, row: int, out: NDArray[Any], *, check: bool) -> None:
        """Decode sample `row` of this chunk into `out` (spec.shape[1:], C-contiguous).

        Raises CorruptError naming file and row.
        """
        self.read_rows([row], out[None], [0], verify="always" if check else "off")

    def read_rows(
        self, rows: Sequence[int], out: NDArray[Any], places: Sequence[int], *, verify: str
    ) -> int:
        """Decode samples `rows` of this chunk into out[places] (spec.shape[1:] each, C-contiguous);
        bytes read.

        verify: always, first_touch or off. Raises CorruptError naming file and row. What is done
        between two calls that let go of the GIL is kept short: decode threads wait for each other
        there.
        """
        if self.parts > 1:
            return self._read_parts(rows, out, places, verify)
        index, verified, codec, view = self.index, self.verified, self.spec.codec, self.view
        always, never = verify == "always", verify == "off"
        # Slices are made before the first call, so that little is left to do between two of them.
        sources = (
            None
            if view is None
            else [view[offset : offset + length] for offset, length in map(index.__getitem__, rows)]
        )
        targets = [out[place] for place in places]
        for at, row in enumerate(rows):
            check = always or not (never or verified[row])
            try:
                decode_into(
                    sources[at] if sources is not None else self._bytes(*index[row]),
                    targets[at],
                    codec,
                    check,
                )
            except (ValueError, RuntimeError) as error:
                raise CorruptError(
                    f"inner chunk {row} does not decode: {error}", where=self.path, remedy=REMEDY
                ) from None
            if check:
                verified[row] = 1
        return sum(index[row][1] for row in rows)

    def _read_parts(
        self, rows: Sequence[int], out: NDArray[Any], places: Sequence[int], verify: str
    ) -> int:
        """read_rows where a sample is several inner chunks.

        Each is decoded once into scratch and copied to its columns of the row.
        """
        assert self.spec.inner is not None
        width = self.spec.inner[-1]
        # NumPy copies the last axis run by run: runs of up to four values went 1.4 to 4 times
        # faster one column at a time.
        step = 1 if width <= 4 else width
        scratch, size = np.empty(self.spec.inner[1:], out.dtype), 0
        for row, place in zip(rows, places, strict=True):
            check = verify == "always" or (verify != "off" and not self.verified[row])
            for part in range(self.parts):
                entry = self.index[row * self.parts + part]
                try:
                    decode_into(self._bytes(*entry), scratch, self.spec.codec, check)
                except (ValueError, RuntimeError) as error:
                    what = f"inner chunk {row * self.parts + part} does not decode: {error}"
                    raise CorruptError(what, where=self.path, remedy=REMEDY) from None
                columns = out[place][..., part * width : (part + 1) * width]
                for at in range(0, columns.shape[-1], step):
                    columns[..., at : at + step] = scratch[
                        ..., at : min(at + step, columns.shape[-1])
                    ]
                size += entry[1]
            if check:
                self.verified[row] = 1
        return size

    def read_all(self) -> NDArray[Any]:
        """A plain array's whole chunk, cut to its rows: [rows, ...].

        Decoded once, then kept: a few KB. Do not write into it.
        """
        if self.decoded is None:
            out = np.empty(self.spec.chunk, dtype=self.spec.dtype)
            try:
                decode_into(self._bytes(0, self.size), out, self.spec.codec, True)
            except (ValueError, RuntimeError) as error:
                raise CorruptError(
                    f"a data file does not decode: {error}", where=self.path, remedy=REMEDY
                ) from None
            self.decoded = out[: self.rows]
        return self.decoded

    def close(self) -> None:
        # The map goes with its last view: another thread may still be decoding from it.
        self.view = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def foreign(metadata: dict[str, Any], spec: ArraySpec) -> str | None:
    """Why an array with these zarr.json contents is beyond this module, in half a sentence; None
    when it is of our codecs.

    Raises ValueError or KeyError when the contents are no array's metadata.
    """
    codecs, why = metadata["codecs"], None
    if spec.inner is not None and [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        shard = codecs[0]["configuration"]
        codecs, place = shard["codecs"], shard.get("index_location", "end")
        if [codec["name"] for codec in shard["index_codecs"]] != [
            "bytes",
            "crc32c",
        ] or place != "end":
            why = f"its shard index is of other codecs, at the {place}"
        elif math.prod(shard["chunk_shape"]) != math.prod(spec.inner):
            why = f"its inner chunks are {shard['chunk_shape']}"
    elif spec.inner is not None:
        why = "it is not sharded by sample"
    names = [codec["name"] for codec in codecs]
    grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    keys = metadata["chunk_key_encoding"]
    if names != ["bytes", *(["blosc"] if spec.codec.cname else []), "crc32c"]:
        why = f"its codecs are {' | '.join(names)}"
    elif codecs[0].get("configuration", {}).get("endian", "little") != "little":
        why = "its bytes are big-endian"
    # A cube's spec is by sample, its grid by voxel: the seal of each file is left to tell.
    elif why is None and len(grid) == len(spec.chunk) and grid != spec.chunk:
        why = f"its stored chunks are {grid}"
    elif keys["name"] != "default" or keys.get("configuration", {}).get("separator", "/") != "/":
        why = "its files have other names"
    return why


def chunk_key(spec: ArraySpec, chunk: int) -> str:
    """The file of stored chunk `chunk` below the array's folder (Zarr v3 default key encoding), C
    order over the spec's grid.
    """
    if spec.grid is not None:
        return "/".join(["c", *(str(at) for at in np.unravel_index(chunk, spec.grid))])
    return "/".join(["c", str(chunk), *["0"] * (len(spec.shape) - 1)])


def padded(rows: Sequence[NDArray[Any]], spec: ArraySpec) -> NDArray[Any]:
    """Rows of a plain array as one full stored chunk.

    Places beyond the last row hold the fill value.
    """
    out = np.full(spec.chunk, fill_value(spec), dtype=spec.dtype)
    for at, row in enumerate(rows):
        out[at] = row
    return out
