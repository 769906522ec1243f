"""Read a split through zarr-python, for codecs that the project's own reader does not know.

Zarr decodes, and `CheckedStore` checks what it is given. Invariant: an object is compared with its
row in files.parquet before a byte of it is handed out (its size always, its sha256 as often as
`verify` asks for). From an object store, objects are fetched whole, and the newest are kept. What
was given up: speed, since an inner chunk takes 0.5-1 ms instead of 0.1, and decoding directly into
the batch, since zarr decodes into an array of its own and rows are copied from there.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from warehouse.errors import CorruptError, WarehouseError
from warehouse.format import manifest as tables
from warehouse.format.data_file import REMEDY
from warehouse.format.location import Remote, first_line, zarr_store
from warehouse.read.chunks import ChunkReader, SplitSource, Verify
from warehouse.read.files import VersionFiles

__all__ = ["CheckedStore", "ZarrPythonReader"]


class ZarrPythonReader(ChunkReader):
    """A reader on top of zarr-python, for any codecs, nested shards and chunk grids, local or not.

    It is safe for any number of threads.

    Parameters
    ----------
    split
        The split to read.
    verify
        When an object's sha256 is compared: when it is first touched, always, or never.
    keep
        Objects of an object store that are kept in memory; local files are read where they lie.
    """

    def __init__(self, split: SplitSource, *, verify: Verify, keep: int) -> None:
        super().__init__(split, access="pread", verify=verify, keep=keep)
        self.store = CheckedStore.of(split.files, verify, keep)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array whose reads are checked.

        Raises
        ------
        CorruptError
            If its metadata are not the published ones.
        """
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = self._open_array(name)
            return self._arrays[name]

    def _open_array(self, name: str) -> zarr.Array[Any]:
        path = f"{self.store.prefix}{self.split.group}/{name}"
        try:
            opened = zarr.open_array(self.store, path=path, mode="r", zarr_format=3)
        except WarehouseError:
            raise
        except Exception as error:
            # Codecs raise errors of any type, which a user cannot tell from a bug of ours.
            raise self._undecodable(name, error) from None

        # The metadata of others may be well-formed and describe another array.
        spec = self.split.stored_specs[name]
        if opened.shape != spec.shape or opened.dtype != np.dtype(spec.dtype):
            raise CorruptError(
                "an array and the manifest disagree",
                where=self.split.where(name),
                expected=f"{spec.dtype} {spec.shape}",
                found=f"{opened.dtype} {opened.shape}",
                remedy=REMEDY,
            )
        return opened

    @property
    def chunk_sizes(self) -> list[int]:
        """Return the number of samples in each stored chunk.

        Where a sample is a row of its array, the chunk grid of the first sharded array decides,
        which need not be the one in the manifest.
        """
        if self.split.origins is not None:
            return self.split.chunk_sizes

        sharded = [name for name, spec in self.split.specs.items() if spec.inner is not None]
        array = self.array(sharded[0] if sharded else next(iter(self.split.specs)))
        size = int((array.shards or array.chunks)[0])
        full, rest = divmod(len(self.split), size)

        return [size] * full + [rest] * (rest > 0)

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Read samples into the arrays `out`, ``[n, ...]`` by name.

        Returns
        -------
        tuple of int
            The number of samples decoded, and the number of bytes read. The first counts every
            sample of an inner chunk, so that it exceeds `n` where inner chunks hold several.

        Raises
        ------
        CorruptError
            If an object is damaged; the message names it.
        """
        decoded = len(indices)

        for name in names:
            array = self.array(name)
            try:
                self._read(name, array, indices, out[name])
            except WarehouseError:
                raise
            except Exception as error:
                raise self._undecodable(name, error, indices) from None

            if self.split.origins is None and self.split.specs[name].inner is not None:
                inner = int(array.chunks[0])
                first = np.unique(indices // inner) * inner
                decoded = max(decoded, int(np.minimum(inner, len(self.split) - first).sum()))

        return decoded, self.store.take_counts(self)

    def _read(
        self, name: str, array: zarr.Array[Any], indices: NDArray[np.int64], out: NDArray[Any]
    ) -> None:
        if self.split.origins is None:
            out[:] = array.oindex[indices]
            return

        origins = self.split.origins(indices)
        sides = self.split.specs[name].shape[1 : 1 + origins.shape[1]]
        for row, origin in enumerate(origins.tolist()):
            region = tuple(
                slice(start, start + side) for start, side in zip(origin, sides, strict=True)
            )
            found: Any = array[region]
            # A sample at the end of the cube reaches beyond the array.
            out[row] = array.fill_value
            out[row][tuple(slice(side) for side in found.shape)] = found

    def _undecodable(
        self, name: str, error: Exception, indices: NDArray[np.int64] | None = None
    ) -> CorruptError:
        where = self.split.where(name)
        if indices is not None:
            more = "..." if len(indices) > 8 else ""
            where += f", a sample of {indices[:8].tolist()}{more}"

        return CorruptError(
            "zarr cannot decode this array",
            where=where,
            found=f"{type(error).__name__}: {error}"[:160],
            remedy=REMEDY,
        )

    def close(self) -> None:
        """Release all objects."""
        super().close()
        self.store.held.clear()


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
            found: Buffer | None = cut(await self._held(key, relative, row, prototype), byte_range)
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

    def take_counts(self, reader: ZarrPythonReader) -> int:
        """Return the bytes read since the last call, and update the reader's count of objects.

        Zarr reads on its own event loop, so that the bytes of one thread cannot be told from those
        of another.
        """
        with self.lock:
            size, self.bytes_read = self.bytes_read, 0
            reader.chunks_opened = self.objects_opened
        return size


def cut(whole: Buffer, byte_range: ByteRequest | None) -> Buffer:
    """Return the part of an object that zarr asked for."""
    if byte_range is None:
        return whole
    if isinstance(byte_range, RangeByteRequest):
        return whole[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return whole[byte_range.offset :]
    assert isinstance(byte_range, SuffixByteRequest)
    return whole[max(0, len(whole) - byte_range.suffix) :]
