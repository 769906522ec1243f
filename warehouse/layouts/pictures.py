"""What a version says about itself once its chunks are baked: arrays, splits, a row a sample, the
digest of it all.

`picture_contents` is for splits of pictures, `cube_contents` (warehouse/layouts/cube.py) for cubes;
publishing is the same for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from warehouse.format.schema import ArraySpec
from warehouse.inspect.summary import SAMPLES_SCHEMA
from warehouse.layouts.metadata import write_pictures
from warehouse.write.bake import BuildPlan, ChunkResult

__all__ = ["Contents", "array_info", "picture_contents"]


@dataclass(frozen=True, slots=True)
class Contents:
    """samples: columns of samples.parquet; digested: what the content digest is of; files.

    Rows of files.parquet beside the chunks'.
    """

    samples: Mapping[str, Any]
    schema: pa.Schema
    digested: Any
    splits: dict[str, dict[str, Any]]
    arrays: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    files: list[dict[str, Any]] = field(default_factory=list)
    cube: dict[str, Any] | None = None


def array_info(specs: Sequence[ArraySpec]) -> dict[str, dict[str, Any]]:
    """The manifest's `arrays`."""
    return {
        spec.name: {
            "dtype": spec.dtype,
            "row": list(spec.shape[1:]),
            "dims": list(spec.dims),
            "sharded": spec.inner is not None,
            "codec": {key: getattr(spec.codec, key) for key in spec.codec.__slots__},
            "attrs": spec.attrs,
        }
        for spec in specs
    }


def picture_contents(
    plan: BuildPlan, results: Sequence[ChunkResult], staging_store: Path
) -> Contents:
    """Writes the groups' metadata too."""
    write_pictures(plan, staging_store)
    digests = [digest for result in results for digest in result.samples]
    rows = [
        {"split": split.name, "index": at, **row}
        for split in plan.splits
        for at, row in enumerate(split.rows)
    ]
    rows = [row | {"sha256": digest} for row, digest in zip(rows, digests, strict=True)]
    arrays = array_info(plan.splits[0].specs)
    digested = [
        [
            {name: [raw["dtype"], raw["row"]] for name, raw in arrays.items()},
            list(plan.class_names),
        ],
        [[split.name, len(split.payloads)] for split in plan.splits],
        digests,
    ]
    splits = {
        split.name: {
            "samples": len(split.payloads),
            "shard_samples": split.shard_samples,
            "chunks": -(-len(split.payloads) // split.shard_samples),
        }
        for split in plan.splits
    }
    return Contents(
        {key: [row[key] for row in rows] for key in rows[0]},
        SAMPLES_SCHEMA,
        digested,
        splits,
        arrays,
        plan.summary,
    )
