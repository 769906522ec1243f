"""Exporting a version's tables as plain Parquet files, for DuckDB and the like."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from warehouse.errors import BuildError, CorruptError
from warehouse.format import manifest as tables
from warehouse.read.version import Warehouse

__all__ = ["export"]


def export(warehouse: Warehouse, output: Path) -> dict[str, int]:
    """Write summary, samples, chunks and trace as Parquet into `output`; rows by file name.

    Raises BuildError when it cannot.
    """
    files = warehouse.table(tables.FILES)
    trace = warehouse.folder / tables.TRACE
    written = {
        "summary.parquet": warehouse.layout.summary_table(warehouse.manifest),
        "samples.parquet": warehouse.table(tables.SAMPLES),
        "chunks.parquet": files.filter(pa.compute.is_valid(files["array"])),
    }
    if trace.is_file():
        try:
            lines = [json.loads(line) for line in trace.read_text().splitlines()]
        except ValueError as error:
            raise CorruptError(
                "the timings do not parse",
                where=trace,
                found=str(error)[:80],
                remedy="delete the file to export the rest",
            ) from None
        written["trace.parquet"] = pa.Table.from_pylist(lines)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, table in written.items():
            pq.write_table(table, output / name)
    except OSError as error:
        raise BuildError(
            "the tables cannot be written",
            where=output,
            found=error.strerror,
            remedy="choose another --export.output",
        ) from None
    return {name: table.num_rows for name, table in written.items()}
