"""Reading a stored chunk: one file of an array, checked when it is opened, decoded row by row.

Invariant: no sample is handed out whose size or, where it is compared, crc32c does not match, and
no file is opened whose seal is not the published one. `warehouse.format.shards` describes the file.
Given up: repairing or skipping a damaged sample; it is always an error that names the file.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from warehouse.errors import CorruptError
from warehouse.format.data_file import REMEDY, open_file
from warehouse.format.inner_chunks import CRC, decode_into
from warehouse.format.location import Location
from warehouse.format.schema import ArraySpec
from warehouse.format.shards import ABSENT, seal_of

__all__ = ["StoredChunk"]


class StoredChunk:
    """One file of an array: mapped, read with `pread`, or held in memory.

    Rows are decoded from it in any order, by any thread. A row is a sample: one inner chunk, or
    `spec.parts` of them, which `index` then holds one after the other.

    Parameters
    ----------
    path
        The file. What is not on a local disk is fetched first and given as `memory`.
    spec
        The array; its `shape[1:]` is the shape of a row.
    rows
        How many samples the file holds, or at which positions, ascending; the others are absent.
    expected
        (size in bytes, seal) from files.parquet.
    access
        `mmap` or `pread`.
    memory
        The whole file, where it was fetched already.

    Raises
    ------
    CorruptError
        The size, the index's crc32c, an entry of the index or the seal is not as published. Names
        the file.
    StoreError
        Too many files are open.
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
        """Compare the file's size with the published one. Raises CorruptError."""
        # What was fetched was compared when it arrived.
        if self.fd < 0:
            return

        # Before a map is touched: reading past the end of a truncated file kills the process
        # (SIGBUS).
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
        """Return (offset, length) of each inner chunk by its number; absent ones are (0, 0)."""
        if self.spec.inner is None:
            if self.size < 4 or CRC.unpack(self._bytes(self.size - 4, 4))[0] != seal:
                raise self._not_as_published("a data file", seal)
            return [(0, self.size)]

        # The seal depends on the checksums of the inner chunks, which are read where the index
        # says: so the index has to be sound before the seal can be compared.
        body = self._read_index()
        index = np.frombuffer(body, "<u8").reshape(-1, 2)
        present = self.present
        if self.parts > 1:
            present = (present[:, None] * self.parts + np.arange(self.parts)).reshape(-1)
        self._check_entries(index, present)

        entries = [(int(offset), int(length)) for offset, length in index[present].tolist()]
        checksums = (bytes(self._bytes(offset + length - 4, 4)) for offset, length in entries)
        if seal_of(b"".join(checksums), body) != seal:
            raise self._not_as_published("a stored chunk", seal)
        if len(entries) == self.rows * self.parts:
            return entries

        # No sample leads to the absent ones.
        table = [(0, 0)] * (self.rows * self.parts)
        for number, entry in zip(present.tolist(), entries, strict=True):
            table[number] = entry
        return table

    def _read_index(self) -> bytes:
        """The index at the end of the file, its own checksum compared and cut off."""
        tail = 16 * self.spec.chunk[0] * self.parts + 4
        if self.size < tail:
            raise CorruptError(
                "a stored chunk is shorter than its index",
                where=self.path,
                expected=f"{tail} bytes",
                found=self.size,
                remedy=REMEDY,
            )
        body = bytes(self._bytes(self.size - tail, tail))
        if crc32c(body[:-4]) != CRC.unpack(body[-4:])[0]:
            raise CorruptError("a shard index fails its crc32c", where=self.path, remedy=REMEDY)
        return body[:-4]

    def _check_entries(self, index: NDArray[np.uint64], present: NDArray[np.int64]) -> None:
        """Check that every entry lies in the file, and that no unexpected one is there."""
        data = self.size - index.nbytes - 4
        offsets, lengths = index[present].T
        # No sum of the two: a forged offset near 2^64 would overflow into range.
        inside = (lengths >= 4) & (lengths <= data)
        inside &= offsets <= data - np.minimum(lengths, data)
        as_expected = (index == ABSENT).all(axis=1)
        as_expected[present] = inside
        if not as_expected.all():
            raise CorruptError(
                "a shard index entry is absent or outside the file",
                where=f"{self.path}, inner chunk {int(np.argmin(as_expected))}",
                remedy=REMEDY,
            )

    def _not_as_published(self, what: str, seal: int) -> CorruptError:
        return CorruptError(
            f"{what} is not the one that was published",
            where=self.path,
            expected=f"seal {seal:08x}",
            remedy=REMEDY,
        )

    def _bytes(self, offset: int, length: int) -> memoryview:
        # A map is sliced without a copy. `pread` costs one, but a file that is cut short meanwhile
        # is an error there and does not kill the process.
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
        """Decode a sample of this chunk into `out`, which is C-contiguous with its shape.

        Raises CorruptError as `read_rows` does.
        """
        self.read_rows([row], out[None], [0], verify="always" if check else "off")

    def read_rows(
        self, rows: Sequence[int], out: NDArray[Any], targets: Sequence[int], *, verify: str
    ) -> int:
        """Decode samples of this chunk straight into rows of `out`.

        Parameters
        ----------
        rows
            Positions of the samples in this chunk.
        out
            [n, *spec.shape[1:]], C-contiguous.
        targets
            The row of `out` for each sample.
        verify
            `always`, `first_touch` or `off`: when a sample's crc32c is compared.

        Returns
        -------
        int
            Encoded bytes that were read.

        Raises
        ------
        CorruptError
            A sample does not decode; names the file and the inner chunk.
        """
        if self.parts > 1:
            return self._read_parts(rows, out, targets, verify)
        index, verified, codec, view = self.index, self.verified, self.spec.codec, self.view
        always, never = verify == "always", verify == "off"

        # Slices are made before the first call, so that little is left to do between two calls that
        # let go of the GIL: decode threads wait for each other there.
        sources = None
        if view is not None:
            entries = map(index.__getitem__, rows)
            sources = [view[offset : offset + length] for offset, length in entries]
        into = [out[target] for target in targets]
        for at, row in enumerate(rows):
            check = always or not (never or verified[row])
            try:
                decode_into(
                    sources[at] if sources is not None else self._bytes(*index[row]),
                    into[at],
                    codec,
                    check,
                )
            except (ValueError, RuntimeError) as error:
                raise self._does_not_decode(row, error) from None
            if check:
                verified[row] = 1
        return sum(index[row][1] for row in rows)

    def _does_not_decode(self, number: int, error: Exception) -> CorruptError:
        return CorruptError(
            f"inner chunk {number} does not decode: {error}", where=self.path, remedy=REMEDY
        )

    def _read_parts(
        self, rows: Sequence[int], out: NDArray[Any], targets: Sequence[int], verify: str
    ) -> int:
        """`read_rows` where a sample is several inner chunks side by side along its last axis.

        Each is decoded once into scratch memory and copied to its columns of the row.
        """
        assert self.spec.inner is not None
        width = self.spec.inner[-1]

        # NumPy copies the last axis run by run: runs of up to four values went 1.4 to 4 times
        # faster one column at a time.
        step = 1 if width <= 4 else width
        scratch, size = np.empty(self.spec.inner[1:], out.dtype), 0

        for row, target in zip(rows, targets, strict=True):
            check = verify == "always" or (verify != "off" and not self.verified[row])
            for part in range(self.parts):
                number = row * self.parts + part
                entry = self.index[number]
                try:
                    decode_into(self._bytes(*entry), scratch, self.spec.codec, check)
                except (ValueError, RuntimeError) as error:
                    raise self._does_not_decode(number, error) from None

                # The last part may be wider than what is left of the row.
                columns = out[target][..., part * width : (part + 1) * width]
                wanted = columns.shape[-1]
                for at in range(0, wanted, step):
                    columns[..., at : at + step] = scratch[..., at : min(at + step, wanted)]
                size += entry[1]
            if check:
                self.verified[row] = 1
        return size

    def read_all(self) -> NDArray[Any]:
        """Return all samples of an array that is not sharded: [rows, ...]. Do not write into it.

        Raises
        ------
        CorruptError
            The file does not decode.
        """
        # Decoded once and kept, since such a file has a few KB and every batch asks for it.
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
        """Close the file. Rows that are being decoded in other threads are still completed."""
        # The map goes with its last view: another thread may still be decoding from it.
        self.view = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        # `__init__` may have raised before there was a descriptor.
        if getattr(self, "fd", -1) >= 0:
            self.close()
