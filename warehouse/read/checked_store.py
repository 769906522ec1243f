"""Check the objects of a published version before zarr-python reads them.

Invariant: no byte of an object is handed out before its size was compared with files.parquet, and
its sha256 as often as `verify` asks for. What was given up: ranges of objects in an object store,
which are fetched whole, since a checksum covers a whole object.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from warehouse.errors import CorruptError
from warehouse.format import manifest as tables
from warehouse.format.data_file import REMEDY
from warehouse.format.location import Remote, first_line, zarr_store
from warehouse.read.chunks import Verify
from warehouse.read.version_files import VersionFiles

__all__ = ["CheckedStore"]


class CheckedStore(WrapperStore[Store]):
    """Compare the objects of a published version with files.parquet before zarr sees them.

    Local files are read where they lie: their size is compared at every read, and they are hashed
    as often as `verify` asks for. Objects of an object store are fetched whole, and the newest
    `keep` of them are kept in memory.
    """

    def __init__(
        self, store: Store, files: VersionFiles, prefix: str, verify: Verify, keep: int
    ) -> None:
        super().__init__(store)
        self.location, self.prefix = files.store, prefix
        self.verify, self.keep = verify, max(1, keep)
        self.expected = files.checksums()
        self.checked: set[str] = set()
        self.held: OrderedDict[str, asyncio.Future[Buffer]] = OrderedDict()
        self.lock = threading.Lock()
        self.bytes_read = self.objects_opened = 0

    @classmethod
    def of(cls, files: VersionFiles, verify: Verify, keep: int) -> CheckedStore:
        """Return the checked store of a version, on a local disk or in an object store."""
        opened, prefix = zarr_store(files.store)
        local = not isinstance(files.store, Remote)
        store = LocalStore(opened, read_only=True) if local else opened

        return cls(store, files, prefix, verify, keep)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object, or a part of it.

        Raises
        ------
        CorruptError
            If the object is not in the table of files, is missing, or has another size or sha256.
            The message names it.
        """
        relative = key.removeprefix(self.prefix)
        row = self.expected.get(f"{tables.STORE}/{relative}")
        if row is None:
            raise CorruptError(
                "an object is not in the table of files",
                where=self.location / relative,
                remedy=REMEDY,
            )
        if isinstance(self.location, Remote):
            found: Buffer | None = _cut(await self._held(key, relative, row, prototype), byte_range)
        else:
            await self._check_local(key, relative, row, prototype)
            found = await self._store.get(key, prototype, byte_range)

        # Zarr would answer a missing chunk with fill values, and nobody would notice.
        if found is None:
            raise CorruptError(
                "a data file is missing", where=self.location / relative, remedy=REMEDY
            )
        self.bytes_read += len(found)
        return found

    async def _check_local(
        self, key: str, relative: str, row: tuple[int, str], prototype: BufferPrototype
    ) -> None:
        path = self.location / relative
        assert not isinstance(path, Remote)
        try:
            size = path.lstat().st_size
        except OSError as error:
            raise CorruptError(
                "a data file is missing or cannot be opened",
                where=path,
                found=error.strerror,
                remedy=REMEDY,
            ) from None
        if size != row[0] or not path.is_file() or path.is_symlink():
            raise CorruptError(
                "a data file has the wrong size",
                where=path,
                expected=f"{row[0]} bytes",
                found=size,
                remedy=REMEDY,
            )
        if self.verify == "always" or (self.verify == "first_touch" and key not in self.checked):
            await self._compare(await self._store.get(key, prototype), relative, row)
        if key not in self.checked:
            self.checked.add(key)
            self.objects_opened += 1

    async def _held(
        self, key: str, relative: str, row: tuple[int, str], prototype: BufferPrototype
    ) -> Buffer:
        # Everything here runs on the one event loop of zarr: a second request for the same object
        # waits for the fetch of the first. shield() keeps a request that is cancelled from
        # cancelling the fetch that others wait for.
        fetch = self.held.get(key)
        if fetch is None:
            fetch = self.held[key] = asyncio.ensure_future(
                self._fetch(key, relative, row, prototype)
            )
            while len(self.held) > self.keep:
                self.held.popitem(last=False)
        else:
            self.held.move_to_end(key)
            if self.verify == "always":
                await self._compare(await asyncio.shield(fetch), relative, row)
        return await asyncio.shield(fetch)

    async def _fetch(
        self, key: str, relative: str, row: tuple[int, str], prototype: BufferPrototype
    ) -> Buffer:
        try:
            try:
                found = await self._store.get(key, prototype)
            except Exception as error:
                raise CorruptError(
                    "an object cannot be fetched",
                    where=self.location / relative,
                    found=first_line(error),
                ) from None
            self.objects_opened += 1
            return await self._compare(found, relative, row)
        except BaseException:
            # A failure is not kept: when the object is asked for again, it is fetched again.
            self.held.pop(key, None)
            raise

    async def _compare(self, found: Buffer | None, relative: str, row: tuple[int, str]) -> Buffer:
        where = self.location / relative
        if found is None:
            raise CorruptError("a data file is missing", where=where, remedy=REMEDY)
        if len(found) != row[0]:
            raise CorruptError(
                "a data file has the wrong size",
                where=where,
                expected=f"{row[0]} bytes",
                found=len(found),
                remedy=REMEDY,
            )
        if self.verify != "off":
            content: Any = found.as_numpy_array()
            # In a thread: hashlib releases the GIL, and the event loop goes on with other objects.
            digest = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
            if digest != row[1]:
                what = "a data file is not the one that was published"
                raise CorruptError(
                    what,
                    where=where,
                    expected=f"sha256 {row[1][:12]}",
                    found=digest[:12],
                    remedy=REMEDY,
                )
        return found

    def take_counts(self) -> tuple[int, int]:
        """Return the bytes read since the last call, and the number of objects opened so far.

        Zarr reads on its own event loop, so that the bytes of one thread cannot be told from those
        of another.
        """
        with self.lock:
            bytes_read, self.bytes_read = self.bytes_read, 0
            return bytes_read, self.objects_opened


def _cut(content: Buffer, byte_range: ByteRequest | None) -> Buffer:
    """Return the part of an object that zarr asked for."""
    if byte_range is None:
        return content
    if isinstance(byte_range, RangeByteRequest):
        return content[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return content[byte_range.offset :]
    assert isinstance(byte_range, SuffixByteRequest)
    return content[max(0, len(content) - byte_range.suffix) :]
