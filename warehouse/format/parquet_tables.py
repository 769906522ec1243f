"""The Parquet tables beside a store: files.parquet and samples.parquet.

Every table is compared with the sha256 that the manifest has for it before a value of it is used.
Given up for that: reading a part of a remote table; it is fetched as a whole.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from warehouse.errors import CorruptError
from warehouse.format import durable
from warehouse.format.location import Location
from warehouse.format.manifest import FILES, REMEDY, Manifest

__all__ = ["FILES_SCHEMA", "open_table", "read_table", "safe_relative", "write_table"]

FILES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("array", pa.string()),
        ("chunk", pa.int64()),
        ("seal", pa.uint32()),
    ]
)
"""Columns of files.parquet.

`path` is below the version folder. `array` ("train/image"), `chunk` and `seal` are null for files
that are no stored chunk, such as zarr.json.
"""


def write_table(path: Path, columns: Mapping[str, object], schema: pa.Schema) -> str:
    """Write a Parquet table durably and return its sha256.

    The same columns give the same bytes with one release of pyarrow.
    """
    table = pa.table(dict(columns), schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", row_group_size=1 << 16, write_page_checksum=True
    )
    data = sink.getvalue().to_pybytes()
    durable.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_table(
    folder: Location, manifest: Manifest, name: str, columns: list[str] | None = None
) -> pa.Table:
    """Return a table of a version, or some columns of it.

    Raises
    ------
    CorruptError
        The table is missing, or its sha256 is not the one in the manifest. Names the file.
    """
    with open_table(folder, manifest, name) as table:
        return table.read(columns)


@contextmanager
def open_table(folder: Location, manifest: Manifest, name: str) -> Iterator[pq.ParquetFile]:
    """Yield a table of a version without reading all of it.

    The row groups of a local table are read when they are asked for.

    Raises
    ------
    CorruptError
        As `read_table`.
    """
    path = folder / name
    with ExitStack() as stack:
        try:
            file: BinaryIO
            if isinstance(path, Path):
                file = stack.enter_context(open(path, "rb"))
            else:
                file = io.BytesIO(path.read_bytes())
            # From the open file, not from its name: nobody can exchange the file in between.
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptError(
                "a table is missing", where=path, found=error.strerror, remedy=REMEDY
            ) from None
        if found != manifest.tables.get(name):
            raise CorruptError(
                "a table was changed after publishing",
                where=path,
                expected=f"sha256 {manifest.tables.get(name, 'none')[:12]}",
                remedy=REMEDY,
            )
        file.seek(0)

        # files.parquet has one row for each file but only a handful of different array names.
        names = ["array"] if name == FILES else None
        yield stack.enter_context(pq.ParquetFile(file, read_dictionary=names))


def safe_relative(name: str, where: Location) -> PurePosixPath:
    """Return a path of a table as one that is safe to join to its folder.

    Raises
    ------
    CorruptError
        The path is empty, absolute, longer than 1,024 characters, or has `..`, a NUL or a
        backslash in it.
    """
    # The table itself may be forged: a digest proves that it is the published one, not that whoever
    # published it meant well.
    path = PurePosixPath(name)
    leads_out = path.is_absolute() or ".." in path.parts
    # A backslash separates folders on Windows, where `..` could hide behind it.
    forbidden = "\0" in name or "\\" in name
    if not name or leads_out or forbidden or len(name) > 1024:
        raise CorruptError(
            "a path in a table leads out of the version",
            where=where,
            found=f"{name[:80]!r}",
            remedy=REMEDY,
        )
    return path
