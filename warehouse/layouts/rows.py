"""Versions that hold a row of arrays for each sample and nothing else.

Features, probabilities and codes are such versions. Each is derived from another version. A
subclass next to its plan says what differs: the attributes of its groups, the columns of
samples.parquet and what its content digest covers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa

from warehouse.format.manifest import Manifest
from warehouse.layouts.base import Layout
from warehouse.layouts.metadata import write_split_groups
from warehouse.layouts.picture_summary import picture_lines, picture_tables, summary_table
from warehouse.layouts.pictures import SAMPLES_SCHEMA
from warehouse.layouts.plan import BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.tables import (
    TextTable,
    VersionTables,
    array_info,
    arrays_table,
    version_table,
)

__all__ = ["Rows"]


@dataclass(frozen=True, kw_only=True)
class Rows(Layout):
    """The layout of rows.

    Parameters
    ----------
    kind
        What the rows are; the `layout` attribute of the Zarr groups.
    source_rows
        Rows of the source's samples.parquet, one for each sample, in the order of the plan.
    """

    kind: str = "rows"
    source_rows: Sequence[Mapping[str, Any]] = ()

    name: ClassVar[str] = "rows"
    schema: ClassVar[pa.Schema] = SAMPLES_SCHEMA

    @classmethod
    def of(cls, manifest: Manifest) -> Self | None:
        """Rows, for any manifest: the registry asks this layout last."""
        return cls()

    # What differs between kinds of rows

    def root_attributes(self, plan: BuildPlan) -> dict[str, Any]:
        """Attributes of the root group, in their order on disk."""
        return {
            "class_names": list(plan.class_names),
            "layout": self.kind,
            "version": plan.version,
        }

    def group_attributes(
        self, plan: BuildPlan, split: SplitPlan, summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Attributes of a split's group, in their order on disk; `summary` is the manifest's."""
        return Rows.root_attributes(self, plan) | {"split": split.name}

    def summary(self, plan: BuildPlan, results: Sequence[ChunkResult]) -> dict[str, Any]:
        """The manifest's summary, with what only the baked chunks can tell."""
        return plan.summary

    def sample_columns(
        self, plan: BuildPlan, digests: Mapping[str, Sequence[str]], store: Path
    ) -> dict[str, Any]:
        """Columns of samples.parquet: the source's, under the samples' own digests.

        Parameters
        ----------
        digests
            Content digest of each sample, by split.
        store
            The Zarr store, whose chunks are baked.
        """
        own = [digest for part in digests.values() for digest in part]
        rows = [
            {**row, "sha256": digest} for row, digest in zip(self.source_rows, own, strict=True)
        ]
        return {name: [row[name] for row in rows] for name in self.schema.names}

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[Any]:
        """JSON that the content digest is computed from."""
        return [plan.recipe["source"]["digest"], {key: list(part) for key, part in digests.items()}]

    # The layout protocol

    def version_tables(
        self, plan: BuildPlan, results: Sequence[ChunkResult], store: Path
    ) -> VersionTables:
        """Write a group for each split and return the tables of the version."""
        summary = self.summary(plan, results)
        write_split_groups(
            plan,
            store,
            self.root_attributes(plan),
            lambda split: self.group_attributes(plan, split, summary),
        )
        digests = _digests_by_split(plan, results)

        return VersionTables(
            samples=self.sample_columns(plan, digests, store),
            schema=self.schema,
            digested=self.digested(plan, digests),
            splits={split.name: split.info for split in plan.splits},
            arrays=array_info(plan.splits[0].specs),
            summary=summary,
        )

    def summary_lines(self, summary: Mapping[str, Any]) -> Sequence[str]:
        if _is_of_pictures(summary):
            return picture_lines(summary)
        return [f"{key}: {json.dumps(value)}" for key, value in summary.items()]

    def summary_table(self, manifest: Manifest) -> pa.Table:
        """The source pictures' summary, or else a row a key, its value as JSON."""
        summary = manifest.summary
        if _is_of_pictures(summary):
            return summary_table(summary)
        return pa.table(
            {"key": list(summary), "value": [json.dumps(value) for value in summary.values()]}
        )

    def text_tables(self, manifest: Manifest) -> Sequence[TextTable]:
        head = [version_table(manifest), arrays_table(manifest)]
        if _is_of_pictures(manifest.summary):
            return [*head, *picture_tables(manifest)]

        counts = tuple((name, str(info.samples)) for name, info in manifest.splits.items())
        return [*head, TextTable("splits", ("split", "samples"), counts)]


def _is_of_pictures(summary: Mapping[str, Any]) -> bool:
    """Whether a version made from pictures has kept their summary."""
    return "all" in summary


def _digests_by_split(plan: BuildPlan, results: Sequence[ChunkResult]) -> dict[str, list[str]]:
    waiting = iter(results)
    digests = {}
    for split in plan.splits:
        # One result for each stored chunk, of which the last may not be full.
        chunks = -(-len(split.payloads) // split.payloads_per_chunk)
        digests[split.name] = [
            digest for result in islice(waiting, chunks) for digest in result.samples
        ]
    return digests
