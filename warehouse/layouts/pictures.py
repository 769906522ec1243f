"""The layout of versions of images.

Each split has a Zarr group, in which the samples lie one after the other, with their boxes in small
arrays beside the images. Invariant: the rows of samples.parquet and the content digests are in the
order of the plan, which is the order of the samples on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from warehouse.format.location import Location
from warehouse.format.manifest import Manifest
from warehouse.layouts.base import Layout
from warehouse.layouts.metadata import write_split_groups
from warehouse.layouts.picture_summary import picture_lines, picture_tables, summary_table
from warehouse.layouts.plan import BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.tables import (
    TextTable,
    VersionTables,
    array_info,
    arrays_table,
    version_table,
)

if TYPE_CHECKING:
    import xarray

__all__ = ["SAMPLES_SCHEMA", "Pictures"]

SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("raw_width", pa.int32()),
        ("raw_height", pa.int32()),
        ("orientation", pa.int8()),
        ("group", pa.string()),
        ("folder", pa.string()),
        ("boxes", pa.int32()),
        ("clipped", pa.int32()),
        ("dropped", pa.int32()),
        ("duplicates", pa.int32()),
        ("sha256", pa.string()),
    ]
)
"""Columns of samples.parquet.

`sha256` is of the sample's decoded arrays, `source_sha256` of the picture's file.
"""


@dataclass(frozen=True)
class Pictures(Layout):
    """The layout of images.

    Parameters
    ----------
    schema
        Columns of samples.parquet; more than `SAMPLES_SCHEMA` where the plan's rows have more.
    """

    schema: pa.Schema = field(default=SAMPLES_SCHEMA)

    name: ClassVar[str] = "pictures"

    @classmethod
    def of(cls, manifest: Manifest) -> Self | None:
        return cls() if "image" in manifest.arrays else None

    def version_tables(
        self, plan: BuildPlan, results: Sequence[ChunkResult], store: Path
    ) -> VersionTables:
        """Write a group for each split; return the rows of the plan with their content digests."""
        # Repeated in every group: a reader that opens one group alone does not see the root.
        shared = {
            "class_names": list(plan.class_names),
            "layout": self.name,
            "version": plan.version,
        }

        def attributes(split: SplitPlan) -> dict[str, Any]:
            return shared | {"split": split.name, "summary": plan.group_summaries[split.name]}

        write_split_groups(plan, store, shared | {"summary": plan.summary}, attributes)

        digests = [digest for result in results for digest in result.samples]
        planned = [
            {"split": split.name, "index": index, **row}
            for split in plan.splits
            for index, row in enumerate(split.rows)
        ]
        rows = [row | {"sha256": digest} for row, digest in zip(planned, digests, strict=True)]
        arrays = array_info(plan.splits[0].specs)
        splits = {split.name: split.info for split in plan.splits}
        shapes = {name: [array.dtype, list(array.row)] for name, array in arrays.items()}

        # Neither codecs nor sizes of chunks: the digest is of what is decoded. Class names are in
        # it, as labels mean nothing without them.
        return VersionTables(
            samples={name: [row[name] for row in rows] for name in self.schema.names},
            schema=self.schema,
            digested=[
                [shapes, list(plan.class_names)],
                [[name, info.samples] for name, info in splits.items()],
                digests,
            ],
            splits=splits,
            arrays=arrays,
            summary=plan.summary,
        )

    def xarray(self, manifest: Manifest, store: Location, split: str) -> xarray.Dataset:
        """Return a split as a dataset; `image` is float32 in [0, 1] for any stored dtype."""
        dataset = super().xarray(manifest, store, split)

        # The attribute goes: xarray would scale again whoever's copy of this dataset it opens.
        image = dataset["image"]
        scale = image.attrs.pop("scale_factor", None)
        values = image.astype("float32")
        if scale is not None:
            values = values * np.float32(scale)
        dataset["image"] = values.assign_attrs(image.attrs)

        return dataset

    def summary_lines(self, summary: Mapping[str, Any]) -> Sequence[str]:
        return picture_lines(summary)

    def summary_table(self, manifest: Manifest) -> pa.Table:
        return summary_table(manifest.summary)

    def text_tables(self, manifest: Manifest) -> Sequence[TextTable]:
        return [version_table(manifest), arrays_table(manifest), *picture_tables(manifest)]
