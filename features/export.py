"""Export a version of features for programs that do not read warehouses.

The job queue is written as CSV and Parquet tables, and each image as an .npz file, as older
notebooks read them.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils.jobs.queue import JobQueue
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.read.version import Warehouse

__all__ = ["export_npz", "export_queue"]

COLUMNS = (
    "id",
    "split",
    "chunk",
    "samples",
    "state",
    "attempts",
    "host",
    "pid",
    "claimed",
    "ended",
    "seconds",
    "digest",
    "error",
)


def export_queue(queue: JobQueue, source: Warehouse, version: str, job_size: int) -> list[Path]:
    """Write jobs_queue.csv and jobs_queue.parquet beside the queue, with a row for each job.

    Parameters
    ----------
    queue
        The jobs of `version`.
    source
        The warehouse of images; its names are listed with each job (`;` separates them in the CSV).
    version
        Name of the version of features, for the path of each stored chunk.
    """
    names: dict[str, list[str]] = {}
    table = source.table(tables.SAMPLES, ["split", "source"])
    for split, name in zip(table["split"].to_pylist(), table["source"].to_pylist(), strict=True):
        names.setdefault(split, []).append(name)

    rows = []
    for row in queue.rows():
        # Jobs keep the order of the source, so a job's images follow one another in its table.
        first = row["chunk"] * job_size
        chunk = f"{version}/{tables.STORE}/{row['split']}/feature/c/{row['chunk']}/0"
        pictures = names[row["split"]][first : first + job_size]
        rows.append(
            {key: row[key] for key in COLUMNS} | {"features_path": chunk, "pictures": pictures}
        )

    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "features_path", "pictures"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"pictures": ";".join(row["pictures"])} for row in rows)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)

    csv_path = queue.path.with_name("jobs_queue.csv")
    parquet_path = queue.path.with_name("jobs_queue.parquet")
    durable.write_bytes(csv_path, text.getvalue().encode())
    durable.write_bytes(parquet_path, sink.getvalue().to_pybytes())
    return [csv_path, parquet_path]


def export_npz(version: Warehouse, folder: Path) -> int:
    """Write features/encoder_<name>/img_<split>_<index>.npz for each image; return their number.

    Each file has `global_pool`, float16 [D]. A file <split>.done marks a finished split.
    """
    # Names of encoders may be paths or hub names with slashes.
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", version.manifest.recipe["encoder"]["name"]).strip("_")
    out = folder / "features" / f"encoder_{safe}"
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name in version.splits:
        features = version.split(name).array("feature")[:]
        for index, row in enumerate(features):
            data = io.BytesIO()
            np.savez(data, global_pool=row)
            (out / f"img_{name}_{index:06d}.npz").write_bytes(data.getvalue())
        # After all files of the split, so that an interrupted export leaves no mark.
        (out / f"{name}.done").write_text(f"{len(features)}\n")
        count += len(features)
    return count
