"""Comparing a published version with its digests: every file's size and sha256, every inner chunk's
crc32c, nothing extra, nothing missing.

`quick` compares sizes and opens every stored chunk (index, seal); `full` also hashes every file,
decodes every inner chunk and recomputes each sample's content digest. Reports all faults instead of
stopping at the first.
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

from warehouse.errors import CorruptError, WarehouseError
from warehouse.format import manifest as tables
from warehouse.format.parquet_tables import safe_relative
from warehouse.read.version import Split, Warehouse

__all__ = ["Fault", "verify"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One disagreement: the file's path below the version folder, and what is wrong in one line."""

    path: str
    detail: str


def verify(
    warehouse: Warehouse, level: str = "full", *, progress: Callable[[int], None] | None = None
) -> tuple[int, list[Fault]]:
    """(files looked at, faults). The manifest itself was checked when the warehouse was opened.

    Memory: one sample a thread.
    """
    faults: list[Fault] = []
    try:
        files = warehouse.table(tables.FILES).to_pylist()
        warehouse.table(tables.SAMPLES, ["split"])
        _check_rejected(warehouse)
    except CorruptError as error:
        return 0, [Fault(Path(str(error.where)).name, str(error))]
    faults += _strays(warehouse, {row["path"] for row in files})
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for found in pool.map(lambda row: _check_file(warehouse.folder, row, level), files):
            faults += found
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
    """Files the table does not list, and links, which would lead readers out of the version."""
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
                yield Fault(relative, "a symbolic link does not belong into a version")
            elif name in names and relative not in known and relative not in own:
                yield Fault(relative, "a file that was not published")


def _check_file(folder: Path, row: dict[str, Any], level: str) -> list[Fault]:
    try:
        path = folder / safe_relative(row["path"], folder / tables.FILES)
    except CorruptError as error:
        return [Fault(tables.FILES, str(error))]
    try:
        detail = _disagreement(path, row, level)
    except OSError as error:
        detail = f"missing or unreadable: {error.strerror}"
    return [Fault(row["path"], detail)] if detail else []


def _disagreement(path: Path, row: dict[str, Any], level: str) -> str:
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
    """Open every stored chunk.

    In `full`, decode its samples and compare their content digests with samples.parquet.
    """
    reader = split.reader(access="pread", verify="always", keep=8)
    rows = warehouse.table(tables.SAMPLES, ["split", "sha256"])
    digests = [
        digest
        for name, digest in zip(rows["split"].to_pylist(), rows["sha256"].to_pylist(), strict=True)
        if name == split.name
    ]
    prefix = f"{tables.STORE}/{split.group}/"
    starts = split.sample_index.starts.tolist()
    for chunk, size in enumerate(split.chunk_sizes):
        start = starts[chunk]
        try:
            small = {
                name: reader.small(name, chunk)
                for name, spec in split.specs.items()
                if spec.inner is None
            }
            stored = {
                name: reader.chunk(name, chunk)
                for name, spec in split.specs.items()
                if spec.inner is not None
            }
            if level == "full":
                rows_out = {
                    name: np.empty(split.specs[name].shape[1:], split.specs[name].dtype)
                    for name in stored
                }
                rows_in = split.sample_index.locate(np.arange(start, start + size))[1].tolist()
                for at, row in enumerate(rows_in):
                    digest = hashlib.sha256()
                    for name in split.specs:
                        if name in stored:
                            stored[name].read_row(row, rows_out[name], check=True)
                        array = rows_out[name] if name in stored else small[name][row]
                        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
                    if digest.hexdigest() != digests[start + at]:
                        yield Fault(
                            f"{prefix}*/c/{chunk}",
                            f"sample {start + at} of {split.name} is not what was baked",
                        )
        except WarehouseError as error:
            where = str(error.where).split(", inner chunk")[0]
            relative = (
                Path(where).relative_to(warehouse.folder).as_posix()
                if where.startswith(str(warehouse.folder))
                else where
            )
            if relative not in broken:
                yield Fault(relative, str(error))
        if progress:
            progress(size)
    reader.close()
