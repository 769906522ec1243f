"""The tables and the manifest of a version, written once its chunks are baked.

Invariant: what is written follows from the plan and the results alone, and not from who baked which
chunk first. `warehouse.write.publish` calls these functions in the order in which things have to
become durable.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.manifest import Manifest
from warehouse.format.parquet_tables import FILES_SCHEMA, write_table
from warehouse.layouts.plan import BuildPlan
from warehouse.layouts.tables import VersionTables

__all__ = ["drop_strays", "make_manifest", "metadata_rows", "write_tables"]


def drop_strays(store: Path, wanted: set[Path]) -> None:
    """Remove files of an earlier plan, which had more samples."""
    for path in sorted(store.rglob("*"), reverse=True):
        if path.is_file() and path not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def metadata_rows(staging: Path) -> list[dict[str, Any]]:
    """Return the rows of files.parquet for the Zarr metadata."""
    # They have no seal: each is read whole, and compared by its SHA-256.
    return [
        {
            "path": path.relative_to(staging).as_posix(),
            "size": path.stat().st_size,
            "sha256": tables.sha256_file(path),
            "array": None,
            "chunk": None,
            "seal": None,
        }
        for path in sorted((staging / tables.STORE).rglob("zarr.json"))
    ]


def write_tables(
    plan: BuildPlan,
    version_tables: VersionTables,
    files: list[dict[str, Any]],
    staging: Path,
) -> dict[str, str]:
    """Write the Parquet tables and rejected.jsonl; return their SHA-256 by file name."""
    # In one order whoever baked which chunk first, so that the table's own digest is repeatable.
    files = sorted(files, key=lambda row: row["path"])
    rejected = "".join(
        json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in plan.rejected
    ).encode()
    durable.write_bytes(staging / tables.REJECTED, rejected)

    samples = staging / tables.SAMPLES
    return {
        tables.FILES: write_table(staging / tables.FILES, _columns(files), FILES_SCHEMA),
        tables.SAMPLES: write_table(samples, version_tables.samples, version_tables.schema),
        tables.REJECTED: hashlib.sha256(rejected).hexdigest(),
    }


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def make_manifest(
    plan: BuildPlan, version_tables: VersionTables, hashes: dict[str, str]
) -> Manifest:
    """Return the manifest of a version whose tables have these SHA-256 digests."""
    return Manifest(
        format_version=plan.recipe["format_version"],
        version=plan.version,
        key=plan.key,
        recipe=plan.recipe,
        thresholds=plan.thresholds,
        toolchain=plan.toolchain,
        digest=hashlib.sha256(tables.canonical(version_tables.digested)).hexdigest(),
        found=plan.found,
        kept=plan.kept,
        rejected=plan.found - plan.kept,
        class_names=list(plan.class_names),
        splits=version_tables.splits,
        arrays=version_tables.arrays,
        summary=version_tables.summary,
        warnings=list(plan.warnings),
        tables=hashes,
        cube=version_tables.cube,
    )
