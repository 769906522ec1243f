"""What a version's tables and manifest take from its layout, and the manifest's view of arrays.

`array_info` and `array_spec` are inverse to each other but for attributes, which only the Zarr
metadata need, and for the number of samples, which is a split's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from warehouse.format.manifest import ArrayInfo, Manifest, SplitInfo
from warehouse.format.schema import ArraySpec

__all__ = [
    "TextTable",
    "VersionTables",
    "array_info",
    "array_spec",
    "arrays_table",
    "version_table",
]


@dataclass(frozen=True, slots=True)
class VersionTables:
    """What a version's tables and manifest hold, once its chunks are baked.

    Attributes
    ----------
    samples, schema
        Columns of samples.parquet and their types.
    digested
        JSON that the content digest is computed from: no codec and no chunk size may change it.
    splits, arrays, summary, cube
        Parts of the manifest.
    files
        Rows of files.parquet, beside those of the baked chunks.
    """

    samples: Mapping[str, Any]
    schema: pa.Schema
    digested: Any
    splits: dict[str, SplitInfo]
    arrays: dict[str, ArrayInfo]
    summary: dict[str, Any]
    files: list[dict[str, Any]] = field(default_factory=list)
    cube: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table for a terminal; without `columns` it has no header."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def array_info(specs: Sequence[ArraySpec]) -> dict[str, ArrayInfo]:
    """The manifest's `arrays`."""
    return {
        spec.name: ArrayInfo(
            dtype=spec.dtype,
            row=spec.shape[1:],
            dims=spec.dims,
            sharded=spec.inner is not None,
            codec=spec.codec,
            attrs=dict(spec.attrs),
        )
        for spec in specs
    }


def array_spec(name: str, array: ArrayInfo, split: SplitInfo) -> ArraySpec:
    """An array of one split, from the manifest."""
    return ArraySpec(
        name=name,
        shape=(split.samples, *array.row),
        dtype=array.dtype,
        dims=array.dims,
        chunk=(split.shard_samples, *array.row),
        inner=(1, *array.row) if array.sharded else None,
        codec=array.codec,
    )


def version_table(manifest: Manifest) -> TextTable:
    """A version and its recipe, for a terminal."""
    settings = manifest.recipe.get("settings", {})
    values = (
        ("digest", manifest.digest),
        ("format", manifest.recipe.get("format")),
        ("found / kept / rejected", f"{manifest.found} / {manifest.kept} / {manifest.rejected}"),
        ("classes", ", ".join(manifest.class_names) or "none"),
        ("code", manifest.recipe.get("code_version")),
        ("settings", ", ".join(f"{key}={value}" for key, value in settings.items())),
    )
    rows = tuple((key, str(value)) for key, value in values)

    return TextTable(f"version {manifest.version}", (), rows)


def arrays_table(manifest: Manifest) -> TextTable:
    """The arrays of a version, for a terminal."""
    rows = []
    for name, array in manifest.arrays.items():
        codec = array.codec.cname or "uncompressed"
        stored = f"{codec}, one sample an inner chunk" if array.sharded else codec
        rows.append((name, array.dtype, str(list(array.row)), ", ".join(array.dims), stored))

    columns = ("array", "dtype", "sample", "dimensions", "stored as")
    return TextTable("arrays", columns, tuple(rows))
