"""Versions of a cube: one array [time, y, x, feature] that all splits share.

Its samples are inner chunks, given to splits by label blocks. Given up: a content digest that knows
of missing stored chunks alone; it is over every inner chunk in C order of the cube, so that no
stored chunk size changes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.errors import SourceError
from warehouse.format.location import Location, zarr_store
from warehouse.format.manifest import Manifest, SplitInfo
from warehouse.format.schema import ArraySpec
from warehouse.layouts.base import Layout, Origins, ReadArray, SampleIndex
from warehouse.layouts.cube.arrays import LABELS, VALID_SHARE, cube_arrays
from warehouse.layouts.cube.feature_stats import merge_features, valid_by_date
from warehouse.layouts.cube.geometry import (
    LEFT_OUT,
    CubeChunking,
    CubeGeometry,
    CubeSampleIndex,
)
from warehouse.layouts.cube.text import cube_lines, cube_tables
from warehouse.layouts.cube.zarr_group import on_disk, write_cube_group
from warehouse.layouts.features import Feature
from warehouse.layouts.plan import BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.tables import TextTable, VersionTables, array_info
from warehouse.settings import SPLIT_NAMES

if TYPE_CHECKING:
    import xarray

__all__ = ["CUBE_SAMPLES_SCHEMA", "Cube"]

CUBE_SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("chunk", pa.int64()),
        ("slot", pa.int32()),
        ("t", pa.int64()),
        ("y", pa.int64()),
        ("x", pa.int64()),
        ("valid_share", pa.float32()),
        ("sha256", pa.string()),
    ]
)
"""Columns of samples.parquet.

`chunk` is the number of the stored chunk in the cube, `slot` the position of the inner chunk in it;
`t`, `y`, `x` are the first voxel; `sha256` is of the decoded data and valid.
"""

FEATURES_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("kind", pa.string()),
        ("codes", pa.list_(pa.int64())),
        ("class_counts", pa.list_(pa.int64())),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("minimum", pa.float64()),
        ("maximum", pa.float64()),
        ("valid_share", pa.float64()),
        ("static", pa.bool_()),
        ("units", pa.string()),
    ]
)


@dataclass(frozen=True)
class Cube(Layout):
    """The layout of a cube.

    Parameters
    ----------
    geometry
        The cube; its features have no statistics yet when it is to be built.
    labels
        Split of each label block, uint8 [block grid]; needed for building only.
    date_sources
        For building: what each date was read from, for error messages.
    keep_empty_dates
        For building: keep a date without any valid value of a feature that varies with time,
        instead of refusing it.
    """

    geometry: CubeGeometry
    labels: NDArray[np.uint8] | None = None
    date_sources: tuple[str, ...] = ()
    keep_empty_dates: bool = False

    name: ClassVar[str] = "cube"

    @classmethod
    def of(cls, manifest: Manifest) -> Self | None:
        return cls(CubeGeometry.of(manifest.cube)) if manifest.cube is not None else None

    # Building

    def split_sizes(self, plan: BuildPlan) -> dict[str, int]:
        labels = self.geometry.layout.inner_labels(self._known_labels()).reshape(-1)
        counts = np.bincount(labels, minlength=LEFT_OUT + 1)

        return {name: int(count) for name, count in zip(SPLIT_NAMES, counts, strict=False) if count}

    def probe(self, plan: BuildPlan, count: int) -> Sequence[tuple[SplitPlan, Any]]:
        """One stored chunk from the middle: it takes as long as many pictures."""
        payloads = [(split, payload) for split in plan.splits for payload in split.payloads]
        middle = len(payloads) // 2

        return payloads[middle : middle + 1]

    def version_tables(
        self, plan: BuildPlan, results: Sequence[ChunkResult], store: Path
    ) -> VersionTables:
        """Write the group, its coordinates and small arrays.

        Raises
        ------
        SourceError
            For a date without any valid value.
        """
        layout, labels = self.geometry.layout, self._known_labels()
        facts = [result.facts for result in results]
        self._check_dates(facts)
        geometry = replace(self.geometry, features=merge_features(self.features, facts))

        digests = np.zeros((layout.stored_chunks, layout.slots), "S64")
        shares = np.zeros((layout.stored_chunks, layout.slots), np.float32)
        for chunk, result in enumerate(results):
            present = layout.present(chunk)
            digests[chunk, present] = result.samples
            shares[chunk, present] = result.facts["valid_share"]

        columns, splits = _samples(layout, labels, digests, shares)
        inner_labels = layout.inner_labels(labels)
        counts = {name: info.samples for name, info in splits.items()}
        counts["left_out"] = int(np.count_nonzero(inner_labels == LEFT_OUT))
        summary = plan.summary | {"samples": counts}

        specs = plan.splits[0].specs
        files = write_cube_group(
            store,
            geometry,
            specs,
            labels,
            _by_inner(layout, shares),
            version=plan.version,
            summary=summary,
        )
        features = [[each.name, each.kind, list(each.codes)] for each in geometry.features]

        return VersionTables(
            samples=columns,
            schema=CUBE_SAMPLES_SCHEMA,
            digested=[
                [list(layout.shape), list(layout.inner), features, list(geometry.times)],
                inner_labels.tobytes().hex(),
                _by_inner(layout, digests).tobytes().decode(),
            ],
            splits=splits,
            arrays=array_info(specs),
            summary=summary,
            files=files,
            cube=geometry.to_json(),
        )

    def _known_labels(self) -> NDArray[np.uint8]:
        assert self.labels is not None, "a cube is planned with its labels"
        return self.labels

    def _check_dates(self, facts: Sequence[dict[str, Any]]) -> None:
        if self.keep_empty_dates or all(feature.static for feature in self.features):
            return

        empty = np.flatnonzero(valid_by_date(self.geometry.layout, facts) == 0)
        if empty.size:
            first = int(empty[0])
            raise SourceError(
                f"{empty.size} dates hold no valid value, the first is "
                f"{self.geometry.times[first]}",
                where=self.date_sources[first],
                remedy="move these files away, or keep such dates with --raster.empty_dates keep",
            )

    # Reading

    @property
    def features(self) -> tuple[Feature, ...]:
        return self.geometry.features

    def group(self, split: str) -> str:
        """The group that all splits share."""
        return "cube"

    def specs(self, manifest: Manifest, split: str) -> dict[str, ArraySpec]:
        compressor = manifest.arrays["data"].codec.cname or "none"
        samples = manifest.splits[split].samples

        return {spec.name: spec for spec in cube_arrays(self.geometry.layout, compressor, samples)}

    def stored_spec(self, spec: ArraySpec) -> ArraySpec:
        return on_disk(spec, self.geometry)

    def sample_index(
        self, manifest: Manifest, split: str, read_array: ReadArray
    ) -> CubeSampleIndex:
        """Where the samples of a split lie.

        Raises CorruptError when the stored labels disagree with their checksum.
        """
        return self.label_index(SPLIT_NAMES.index(split), self.small_array(LABELS.name, read_array))

    def origins(self, index: SampleIndex) -> Origins:
        assert isinstance(index, CubeSampleIndex)
        return index.origins

    def label_index(self, label: int, labels: NDArray[np.uint8]) -> CubeSampleIndex:
        """Where the samples under one label lie (0 train, 1 val, 2 test, 3 left out)."""
        return CubeSampleIndex(self.geometry.layout, labels, label)

    def small_array(self, name: str, read_array: ReadArray) -> NDArray[Any]:
        """`split` (uint8 [block grid]) or `valid_share` (float32 [inner grid])."""
        arrays = {each.name: each for each in (LABELS, VALID_SHARE)}
        return read_array("cube", arrays[name].spec(self.geometry.layout))

    def xarray(self, manifest: Manifest, store: Location, split: str) -> xarray.Dataset:
        """The whole cube, since splits share its axes, with its coordinates.

        Feature groups are chunks apart: a feature is read without the others' groups.
        """
        import xarray

        layout = self.geometry.layout
        chunk = (*layout.shard, layout.group)
        sizes = dict(zip(("time", "y", "x", "feature"), chunk, strict=True))
        opened, prefix = zarr_store(store)

        return xarray.open_zarr(opened, group=f"{prefix}cube", chunks=sizes, decode_coords="all")

    # Showing

    def summary_lines(self, summary: Mapping[str, Any]) -> Sequence[str]:
        return cube_lines(summary)

    def summary_table(self, manifest: Manifest) -> pa.Table:
        """The feature table, a row a feature."""
        return pa.Table.from_pylist(
            [feature.to_json() for feature in self.features], schema=FEATURES_SCHEMA
        )

    def text_tables(self, manifest: Manifest) -> Sequence[TextTable]:
        return cube_tables(self.geometry, manifest)


def _by_inner(layout: CubeChunking, values: NDArray[Any]) -> NDArray[Any]:
    """[stored chunks, slots] -> [inner grid]: the inverse of CubeChunking.by_chunk."""
    grid, per, inner = layout.shard_grid, layout.per_shard, layout.inner_grid
    room = (
        values.reshape(*grid, *per)
        .transpose(0, 3, 1, 4, 2, 5)
        .reshape([g * p for g, p in zip(grid, per, strict=True)])
    )
    return np.ascontiguousarray(room[: inner[0], : inner[1], : inner[2]])


def _samples(
    layout: CubeChunking,
    labels: NDArray[np.uint8],
    digests: NDArray[Any],
    shares: NDArray[np.float32],
) -> tuple[dict[str, Any], dict[str, SplitInfo]]:
    """(columns of samples.parquet, the manifest's splits). A split without samples is left out."""
    parts: list[dict[str, Any]] = []
    splits: dict[str, SplitInfo] = {}
    for label, name in enumerate(SPLIT_NAMES):
        index = CubeSampleIndex(layout, labels, label)
        if not len(index):
            continue
        samples = np.arange(len(index))
        chunks, origins = index.numbers[index.chunks], index.origins(samples)
        parts.append(
            {
                "split": np.full(len(index), name),
                "index": samples,
                "chunk": chunks,
                "slot": index.slots.astype(np.int32),
                "t": origins[:, 0],
                "y": origins[:, 1],
                "x": origins[:, 2],
                "valid_share": shares[chunks, index.slots],
                "sha256": digests[chunks, index.slots].astype(str),
            }
        )
        splits[name] = SplitInfo(
            samples=len(index),
            shard_samples=layout.slots,
            chunks=len(index.chunk_sizes),
        )
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, splits
