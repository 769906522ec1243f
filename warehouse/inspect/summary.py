"""Export the tables of a version as plain Parquet files, for DuckDB and similar tools.

The files of the version itself have names and columns that serve its readers. The exported ones are
what a person asks for: counts, samples, stored chunks and the timings of the build.
"""

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
    """Write the summary, samples, chunks and trace of a version as Parquet files.

    Parameters
    ----------
    warehouse
        The version, on a local disk.
    output
        The folder to write into; it is made if it does not exist.

    Returns
    -------
    dict of str to int
        The number of rows of each file, by its name.

    Raises
    ------
    StoreError
        If the version is in an object store.
    CorruptError
        If a table differs from the one that was published, or the trace does not parse.
    BuildError
        If the files cannot be written.
    """
    files = warehouse.table(tables.FILES)
    trace = warehouse.folder / tables.TRACE

    # Only rows of arrays are stored chunks: files.parquet also lists each zarr.json.
    written = {
        "summary.parquet": warehouse.layout.summary_table(warehouse.manifest),
        "samples.parquet": warehouse.table(tables.SAMPLES),
        "chunks.parquet": files.filter(pa.compute.is_valid(files["array"])),
    }

    # A build without --build.trace leaves none, and it is not part of what verification covers.
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
