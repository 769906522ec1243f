"""Read a split through zarr-python, for codecs that the project's own reader does not know.

Zarr decodes, and `CheckedStore` checks what it is given. Invariant: an object is compared with its
row in files.parquet before a byte of it is handed out (its size always, its sha256 as often as
`verify` asks for). From an object store, objects are fetched whole, and the newest are kept. What
was given up: speed, since an inner chunk takes 0.5-1 ms instead of 0.1, and decoding directly into
the batch, since zarr decodes into an array of its own and rows are copied from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from warehouse.errors import CorruptError, WarehouseError
from warehouse.format.data_file import REMEDY
from warehouse.read.checked_store import CheckedStore
from warehouse.read.chunks import ChunkReader, SplitSource, Verify

__all__ = ["ZarrPythonReader"]


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

        bytes_read, opened = self.store.take_counts()
        # The count only grows; a slower thread must not set it back.
        with self._lock:
            self.chunks_opened = max(self.chunks_opened, opened)
        return decoded, bytes_read

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
