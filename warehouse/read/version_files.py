"""The files of a version by array: where each lies, and the size and seal it was published with.

files.parquet has a row for each file of a version. It is read when the first file is asked for, and
by its buffers, since Arrow's own functions would load 40 MB of code.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from warehouse.errors import CorruptError
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import chunk_key
from warehouse.format.location import Location, Remote
from warehouse.format.manifest import Manifest
from warehouse.format.parquet_tables import open_table, read_table, safe_relative
from warehouse.format.schema import ArraySpec
from warehouse.format.stored_chunk import StoredChunk

__all__ = ["Access", "VersionFiles", "open_stored"]

Access = Literal["mmap", "pread"]
SizesAndSeals = tuple[NDArray[np.int64], NDArray[np.uint32]]
"""Of an array's files, by stored chunk."""


class VersionFiles:
    """The published files of one version.

    Parameters
    ----------
    location
        Where the version lies: a folder, or a prefix of an object store.
    manifest
        Its manifest, which has the checksum of files.parquet.
    """

    def __init__(self, location: Location, manifest: Manifest) -> None:
        self.location, self.manifest = location, manifest

    @property
    def store(self) -> Location:
        """The plain Zarr v3 store."""
        return self.location / tables.STORE

    def sizes_and_seals(self, array: str) -> SizesAndSeals:
        """Sizes, int64, and seals, uint32, of an array's files ("train/image") by stored chunk.

        Raises
        ------
        CorruptError
            If files.parquet is damaged or has no row for one of the files.
        """
        sizes, seals = self._by_array.get(array, (np.empty(0, np.int64), np.empty(0, np.uint32)))
        if not sizes.all():
            raise CorruptError(
                "the table of files has gaps", where=self.location / tables.FILES, found=array
            )
        return sizes, seals

    def checksums(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of every file, by its path below the version's folder."""
        table = read_table(
            self.location, self.manifest, tables.FILES, ["path", "size", "sha256"]
        ).to_pydict()
        values = zip(table["size"], table["sha256"], strict=True)

        return dict(zip(table["path"], values, strict=True))

    def chunk_path(self, group: str, spec: ArraySpec, chunk: int) -> Location:
        """The file of a stored chunk, by the chunk's number in the array."""
        name = f"{group}/{spec.name}/{chunk_key(spec, chunk)}"
        return self.store / safe_relative(name, self.store)

    def read_array(self, group: str, spec: ArraySpec) -> NDArray[Any]:
        """A small array that is stored in one file, checked.

        Raises
        ------
        CorruptError
            If the file differs from the one that was published.
        """
        sizes, seals = self.sizes_and_seals(f"{group}/{spec.name}")
        expected = int(sizes[0]), int(seals[0])
        path = self.chunk_path(group, spec, 0)

        return open_stored(path, spec, spec.shape[0], expected, "pread").read_all()

    @cached_property
    def _by_array(self) -> dict[str, SizesAndSeals]:
        with open_table(self.location, self.manifest, tables.FILES) as table:
            return _sizes_and_seals(table)


def open_stored(
    path: Location,
    spec: ArraySpec,
    rows: int | NDArray[np.int64],
    expected: tuple[int, int],
    access: Access,
) -> StoredChunk:
    """Open a stored chunk of a local file, or of an object that is fetched whole.

    Parameters
    ----------
    rows
        Rows that the file holds: the first so many, or these.
    expected
        Published size and seal.

    Raises
    ------
    CorruptError
        If the file differs from the one that was published.
    """
    memory = None
    if isinstance(path, Remote):
        memory = memoryview(bytearray(expected[0]))
        path.read_into(memory)

    return StoredChunk(path, spec, rows, expected, access, memory)


def _sizes_and_seals(table: pq.ParquetFile) -> dict[str, SizesAndSeals]:
    """Sizes and seals by array and stored chunk; size 0 where the table has no file.

    Memory: 12 bytes a file, and a row group.
    """
    found: dict[str, SizesAndSeals] = {}
    lengths: dict[str, int] = {}
    most = table.metadata.num_rows
    names = ["array", "chunk", "size", "seal"]

    for batch in table.iter_batches(1 << 13, columns=names, use_threads=False):
        array = batch["array"]
        arrays = array.dictionary.to_pylist()
        codes = np.where(_present(array), _values(array.indices, np.int32), -1)
        chunks = _values(batch["chunk"], np.int64)
        sizes = _values(batch["size"], np.int64)
        seals = _values(batch["seal"], np.uint32)

        for code in np.unique(codes[codes >= 0]).tolist():
            name, rows = arrays[code], codes == code
            chunk = chunks[rows]
            if not 0 <= chunk.min() <= chunk.max() < most:
                raise CorruptError(
                    "a stored chunk's number is out of range",
                    where=tables.FILES,
                    expected=f"below {most}",
                )

            # np.zeros of many pages costs nothing until they are written.
            if name not in found:
                found[name] = np.zeros(most, np.int64), np.zeros(most, np.uint32)
            found[name][0][chunk], found[name][1][chunk] = sizes[rows], seals[rows]
            lengths[name] = max(lengths.get(name, 0), int(chunk.max()) + 1)

    return {
        name: (sizes[: lengths[name]], seals[: lengths[name]])
        for name, (sizes, seals) in found.items()
    }


def _values(column: pa.Array, dtype: DTypeLike) -> NDArray[Any]:
    """The values of an Arrow column, arbitrary where it is null."""
    values = np.frombuffer(column.buffers()[1], dtype)
    return values[column.offset : column.offset + len(column)]


def _present(column: pa.Array) -> NDArray[np.bool_]:
    """True where an Arrow column is not null."""
    if column.buffers()[0] is None:
        return np.ones(len(column), bool)

    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)
