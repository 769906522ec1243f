"""The protocol of layouts: what a kind of version consists of.

A layout is the only place that knows which arrays a version has, where its samples lie, with which
tables and metadata it is published, and how it is shown. The builder, the publisher, the readers
and the reports ask it. Invariant: a layout does index arithmetic and writes metadata; it opens no
file of samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.format.location import Location, zarr_store
from warehouse.format.manifest import Manifest
from warehouse.format.schema import ArraySpec
from warehouse.layouts.features import Feature
from warehouse.layouts.plan import BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.tables import TextTable, VersionTables, array_spec

if TYPE_CHECKING:
    import xarray

__all__ = ["EvenSampleIndex", "Layout", "Origins", "ReadArray", "SampleIndex"]

ReadArray = Callable[[str, ArraySpec], NDArray[Any]]
"""(group, spec) -> the checked values of a small array that is stored in one file."""

Origins = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Sample numbers [n] -> the first element of each in the Zarr array, [n, dimensions]."""


class SampleIndex(Protocol):
    """Where the samples of a split lie: sample number -> (stored chunk of the split, row in it).

    A split numbers its stored chunks from 0, in the order of its samples.
    """

    @property
    def chunk_sizes(self) -> list[int]:
        """Number of samples of this split in each of its stored chunks."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first sample of each stored chunk, then of all samples: [chunks + 1]."""

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (stored chunk of the split, row in it) of each sample, both int64 [n]."""

    def stored(self, chunk: int) -> int:
        """Return the number in the array of a stored chunk of the split, as in files.parquet."""

    def present(self, chunk: int) -> int | NDArray[np.int64]:
        """Return the rows that the file holds: how many from the first on, or which ones."""


@dataclass(frozen=True, slots=True)
class EvenSampleIndex:
    """A sample index with `size` samples in each stored chunk; the last one may hold fewer.

    The stored chunks of the split are numbered as those of the array are.
    """

    samples: int
    size: int

    @property
    def chunk_sizes(self) -> list[int]:
        full, rest = divmod(self.samples, self.size)
        return [self.size] * full + [rest] * (rest > 0)

    @property
    def starts(self) -> NDArray[np.int64]:
        chunks = -(-self.samples // self.size)
        return np.minimum(np.arange(chunks + 1, dtype=np.int64) * self.size, self.samples)

    def locate(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.divmod(indices, self.size)

    def stored(self, chunk: int) -> int:
        return chunk

    def present(self, chunk: int) -> int:
        return min(self.size, self.samples - chunk * self.size)


class Layout(ABC):
    """One kind of version.

    A layout is made in two ways: by whoever plans a build, with what `version_tables` will need, or
    by `of` from the manifest of a published version. The abstract methods have to be written for
    each kind; the defaults of the others are for versions with one Zarr group for each split, whose
    samples lie one after the other. A new layout is a subclass in a file of its own and an entry in
    `warehouse.layouts.registry`.
    """

    name: ClassVar[str]
    """Name of the kind, for messages and for tables that are keyed by it."""

    @classmethod
    @abstractmethod
    def of(cls, manifest: Manifest) -> Self | None:
        """Return the layout of a published version, or None where it is of another kind."""

    # Building

    def split_sizes(self, plan: BuildPlan) -> dict[str, int]:
        """Return the number of samples of each split that has any."""
        return {split.name: split.info.samples for split in plan.splits}

    def probe(self, plan: BuildPlan, count: int) -> Sequence[tuple[SplitPlan, Any]]:
        """Return about `count` payloads, whose cost is scaled up to that of the whole build."""
        payloads = [(split, payload) for split in plan.splits for payload in split.payloads]
        step = max(1, len(payloads) // count)

        return payloads[::step][:count]

    @abstractmethod
    def version_tables(
        self, plan: BuildPlan, results: Sequence[ChunkResult], store: Path
    ) -> VersionTables:
        """Write the Zarr metadata below `store` and return the tables of the version.

        Parameters
        ----------
        plan
            The build, all of whose chunks are baked.
        results
            Of each stored chunk, in the order of the plan.
        store
            The Zarr store in the staging folder; the chunk files are there already.
        """

    # Reading

    @property
    def features(self) -> tuple[Feature, ...]:
        """Return the columns of the last axis, where they have names."""
        return ()

    def group(self, split: str) -> str:
        """Return the name of the Zarr group that the arrays of a split lie in."""
        return split

    def specs(self, manifest: Manifest, split: str) -> dict[str, ArraySpec]:
        """Return the arrays of a split, by name, as its readers see them: [sample, ...]."""
        return {
            name: array_spec(name, array, manifest.splits[split])
            for name, array in manifest.arrays.items()
        }

    def stored_spec(self, spec: ArraySpec) -> ArraySpec:
        """Return the Zarr array that holds what readers see as `spec`."""
        return spec

    def sample_index(self, manifest: Manifest, split: str, read_array: ReadArray) -> SampleIndex:
        """Return where the samples of a split lie. Raises what `read_array` raises."""
        info = manifest.splits[split]
        return EvenSampleIndex(info.samples, info.shard_samples)

    def origins(self, index: SampleIndex) -> Origins | None:
        """Return a function that finds samples in the Zarr array, if they are regions of it.

        None means that sample i is row i of the array.
        """
        return None

    def xarray(self, manifest: Manifest, store: Location, split: str) -> xarray.Dataset:
        """Return a split as a dataset, in Dask chunks of the size of a stored chunk."""
        # Imported here: xarray is an optional dependency, and takes long to import.
        import xarray

        opened, prefix = zarr_store(store)

        return xarray.open_zarr(
            opened,
            group=f"{prefix}{self.group(split)}",
            chunks={"sample": manifest.splits[split].shard_samples},
            mask_and_scale=False,
        )

    # Showing

    @abstractmethod
    def summary_lines(self, summary: Mapping[str, Any]) -> Sequence[str]:
        """Return a summary as the few lines that a log shows."""

    @abstractmethod
    def summary_table(self, manifest: Manifest) -> pa.Table:
        """Return the summary as a table to be exported."""

    @abstractmethod
    def text_tables(self, manifest: Manifest) -> Sequence[TextTable]:
        """Return what a terminal shows of a version: itself, its arrays or features, its splits."""
