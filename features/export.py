"""What a feature version leaves for people beside the store.

Its job queue as tables, and a .npz a picture for older notebooks.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

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
    """jobs_queue.csv and .parquet beside the queue.

    A row a job with its pictures (`;` between them in the CSV) and its stored chunk.
    """
    names: dict[str, list[str]] = {}
    table = source.table(tables.SAMPLES, ["split", "source"])
    for split, name in zip(table["split"].to_pylist(), table["source"].to_pylist(), strict=True):
        names.setdefault(split, []).append(name)
    rows = []
    for row in queue.rows():
        pictures = names[row["split"]][row["chunk"] * job_size : (row["chunk"] + 1) * job_size]
        path = f"{version}/{tables.STORE}/{row['split']}/feature/c/{row['chunk']}/0"
        rows.append(
            {key: row[key] for key in COLUMNS} | {"features_path": path, "pictures": pictures}
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, "features_path", "pictures"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"pictures": ";".join(row["pictures"])} for row in rows)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    out = [queue.path.with_name("jobs_queue.csv"), queue.path.with_name("jobs_queue.parquet")]
    for path, data in zip(
        out, (text.getvalue().encode(), sink.getvalue().to_pybytes()), strict=True
    ):
        durable.write_bytes(path, data)
    return out


def export_npz(version: Warehouse, folder: Path) -> int:
    """features/encoder_<name>/img_<split>_<index>.npz with `global_pool` float16 [D], then a .done
    mark a split; how many pictures.
    """
    encoder: dict[str, Any] = version.manifest.recipe["encoder"]
    out = (
        folder
        / "features"
        / f"encoder_{re.sub(r'[^A-Za-z0-9._-]+', '_', encoder['name']).strip('_')}"
    )
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for name in version.splits:
        features = version.split(name).array("feature")[:]
        for at, row in enumerate(features):
            data = io.BytesIO()
            np.savez(data, global_pool=row)
            (out / f"img_{name}_{at:06d}.npz").write_bytes(data.getvalue())
        (out / f"{name}.done").write_text(f"{len(features)}\n")
        count += len(features)
    return count
