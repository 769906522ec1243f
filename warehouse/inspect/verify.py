"""Compare a published version with its checksums, and report every fault.

The `quick` level compares sizes and opens every stored chunk, which checks its index and its seal.
The `full` level also hashes every file, decodes every inner chunk and computes the content digest
of each sample again. Both look for files that are missing, and for files that were not published.
Invariant: a fault does not stop the check, so that one run shows the extent of the damage. What was
given up: checking a version in an object store, of which every byte would have to be fetched.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import CorruptError, WarehouseError
from warehouse.format import manifest as tables
from warehouse.format.parquet_tables import safe_relative
from warehouse.read.chunks import ChunkReader
from warehouse.read.version import Split, Warehouse

__all__ = ["Fault", "verify"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One difference between a version and what was published.

    Attributes
    ----------
    path
        The file, below the folder of the version.
    detail
        What is wrong, in one line.
    """

    path: str
    detail: str


def verify(
    warehouse: Warehouse, level: str = "full", *, progress: Callable[[int], None] | None = None
) -> tuple[int, list[Fault]]:
    """Check every file and every sample of a version.

    Parameters
    ----------
    warehouse
        The version. Its manifest was checked when it was opened.
    level
        `quick` or `full`.
    progress
        Called with the number of samples of each stored chunk that was checked.

    Returns
    -------
    tuple
        The number of published files, and the faults.

    Notes
    -----
    Memory: one sample a thread.
    """
    faults: list[Fault] = []
    try:
        files = warehouse.table(tables.FILES).to_pylist()
        warehouse.table(tables.SAMPLES, ["split"])
        _check_rejected(warehouse)
    except CorruptError as error:
        # Without the tables there is nothing to compare the files with.
        return 0, [Fault(Path(str(error.where)).name, str(error))]

    faults += _strays(warehouse, {row["path"] for row in files})
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for found in pool.map(lambda row: _check_file(warehouse.folder, row, level), files):
            faults += found

    # A file whose size or hash is wrong is reported once, and not again when its chunks are opened.
    broken = {fault.path for fault in faults}
    for name in warehouse.splits:
        faults += [
            fault
            for fault in _check_chunks(warehouse, warehouse.split(name), level, broken, progress)
            if fault.path not in broken
        ]

    return len(files), faults


def _check_rejected(warehouse: Warehouse) -> None:
    path = warehouse.folder / tables.REJECTED
    try:
        found = tables.sha256_file(path)
    except OSError as error:
        raise CorruptError("a table is missing", where=path, found=error.strerror) from None

    if found != warehouse.manifest.tables[tables.REJECTED]:
        raise CorruptError("a table was changed after publishing", where=path)


def _strays(warehouse: Warehouse, known: set[str]) -> Iterator[Fault]:
    """Yield a fault for each file that the table does not list, and for each symbolic link."""
    # Not in files.parquet: the tables and the manifest have their checksums elsewhere, or, like the
    # trace and the report, differ from run to run.
    own = {
        tables.MANIFEST,
        tables.FILES,
        tables.SAMPLES,
        tables.REJECTED,
        tables.TRACE,
        "report.html",
    }
    for folder, folders, names in os.walk(warehouse.folder):
        for name in (*folders, *names):
            path = Path(folder) / name
            relative = path.relative_to(warehouse.folder).as_posix()
            if path.is_symlink():
                # It would lead readers out of the version, to files that nobody checks.
                yield Fault(relative, "a version must not contain symbolic links")
            elif name in names and relative not in known and relative not in own:
                yield Fault(relative, "a file that was not published")


def _check_file(folder: Path, row: dict[str, Any], level: str) -> list[Fault]:
    try:
        path = folder / safe_relative(row["path"], folder / tables.FILES)
    except CorruptError as error:
        # The table itself is at fault: the path leads out of the version and must not be opened.
        return [Fault(tables.FILES, str(error))]

    try:
        detail = _difference(path, row, level)
    except OSError as error:
        detail = f"missing or unreadable: {error.strerror}"

    return [Fault(row["path"], detail)] if detail else []


def _difference(path: Path, row: dict[str, Any], level: str) -> str:
    """Return what is wrong with a file, an empty text if nothing is."""
    # lstat, not stat: what a link or a device points to is not what was published.
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    if info.st_size != row["size"]:
        return f"wrong size: expected {row['size']} bytes, found {info.st_size}"
    if level == "full" and tables.sha256_file(path) != row["sha256"]:
        return f"wrong sha256: expected {row['sha256'][:12]}"
    return ""


def _check_chunks(
    warehouse: Warehouse,
    split: Split,
    level: str,
    broken: set[str],
    progress: Callable[[int], None] | None,
) -> Iterator[Fault]:
    """Open every stored chunk of a split, and in `full` compare the digests of its samples."""
    # pread: with a memory map, a file that shrinks while it is checked would end the process.
    reader = split.reader(access="pread", verify="always", keep=8)
    digests = _content_digests(warehouse, split)
    # Once a split: computing it for every chunk would take time in the square of their number.
    starts = split.sample_index.starts.tolist()

    for chunk, size in enumerate(split.chunk_sizes):
        try:
            for sample in _changed_samples(reader, chunk, starts, digests, level):
                yield Fault(
                    f"{tables.STORE}/{split.group}/*/c/{chunk}",
                    f"sample {sample} of {split.name} is not what was baked",
                )
        except WarehouseError as error:
            path = _path_in_version(warehouse, error)
            if path not in broken:
                yield Fault(path, str(error))

        if progress:
            progress(size)

    reader.close()


def _content_digests(warehouse: Warehouse, split: Split) -> list[str]:
    """Return the published digests of a split's samples, in stored order."""
    table = warehouse.table(tables.SAMPLES, ["split", "sha256"])
    splits, digests = table["split"].to_pylist(), table["sha256"].to_pylist()

    return [digest for name, digest in zip(splits, digests, strict=True) if name == split.name]


def _changed_samples(
    reader: ChunkReader, chunk: int, starts: list[int], digests: list[str], level: str
) -> Iterator[int]:
    """Open a stored chunk, and in `full` yield the samples that have another digest.

    Raises WarehouseError, which names the file, if the chunk is damaged.
    """
    specs = reader.split.specs
    small = {name: reader.small(name, chunk) for name, spec in specs.items() if spec.inner is None}
    stored = {name: reader.chunk(name, chunk) for name in specs if name not in small}
    if level != "full":
        return

    # One row for each array is reused for all samples, so that memory stays that of one sample.
    buffers = {name: np.empty(specs[name].shape[1:], specs[name].dtype) for name in stored}
    start, stop = starts[chunk : chunk + 2]
    rows = reader.split.sample_index.locate(np.arange(start, stop))[1].tolist()

    for sample, row in enumerate(rows, start):
        arrays: dict[str, NDArray[Any]] = {}
        for name in specs:
            if name in stored:
                stored[name].read_row(row, buffers[name], check=True)
                arrays[name] = buffers[name]
            else:
                arrays[name] = small[name][row]

        if _digest(arrays) != digests[sample]:
            yield sample


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    # `content_digest` of the builder also checks shapes. Here they are those of the manifest, since
    # the arrays were decoded by its specifications.
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)

    return digest.hexdigest()


def _path_in_version(warehouse: Warehouse, error: WarehouseError) -> str:
    """Return the file that an error names, below the folder of the version where it lies there."""
    where = str(error.where).split(", inner chunk")[0]
    if not where.startswith(str(warehouse.folder)):
        return where

    return Path(where).relative_to(warehouse.folder).as_posix()
