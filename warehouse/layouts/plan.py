"""The plan of a build, and what baking its chunks leaves behind.

A plan is made by whoever knows the sources (ingest, features, vqvae, segmentation), carried out by
`warehouse.write`, and turned into tables by its layout once every chunk is baked. Neither side
needs to know the other: both see only these classes. Invariant: a plan is plain data, so that two
plans of the same recipe and sources describe the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from warehouse.errors import PictureError
from warehouse.format.manifest import SplitInfo
from warehouse.format.schema import ArraySpec
from warehouse.layouts.tables import VersionTables

__all__ = [
    "Block",
    "BuildLayout",
    "BuildPlan",
    "ChunkResult",
    "LoadSample",
    "SplitPlan",
]


@dataclass(frozen=True, slots=True)
class Block:
    """A whole stored chunk from one load call.

    Attributes
    ----------
    slots
        Position in the stored chunk of each sample, ascending.
    samples
        One mapping of array name to the sample's array, for each slot.
    seconds
        Time spent, by phase.
    facts
        JSON that is kept in the chunk's marker and handed to the layout.
    """

    slots: Sequence[int]
    samples: Iterator[Mapping[str, NDArray[Any]]]
    seconds: Mapping[str, float]
    facts: dict[str, Any]


LoadSample = Callable[[Any], tuple[Mapping[str, NDArray[Any]], Mapping[str, float]] | Block]
"""payload -> ({array name: one sample's array}, {phase: seconds}), or a Block.

Raises PictureError for a sample that cannot be made.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """One split of a plan; everything in it is in stored order.

    Attributes
    ----------
    name
        Name of the split, which is also the Zarr group that its arrays are written to.
    specs
        Arrays of the split.
    payloads
        What `load` is called with: once for each sample, or for each stored chunk.
    digests
        For each payload, a digest of whatever `load` depends on besides the recipe (boxes, labels).
        A chunk of an earlier run is reused only if they agree.
    rows
        For each payload, a row of samples.parquet.
    whole_chunks
        Whether a payload is a whole stored chunk, so that `load` returns a `Block`.
    """

    name: str
    specs: tuple[ArraySpec, ...]
    payloads: tuple[Any, ...]
    digests: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    whole_chunks: bool = False

    @classmethod
    def of_chunks(
        cls,
        name: str,
        specs: Sequence[ArraySpec],
        payloads: Sequence[Any],
        digest: str = "",
    ) -> SplitPlan:
        """A split whose payloads are whole stored chunks, which all depend on the same `digest`."""
        count = len(payloads)

        return cls(
            name=name,
            specs=tuple(specs),
            payloads=tuple(payloads),
            digests=(digest,) * count,
            rows=({},) * count,
            whole_chunks=True,
        )

    @property
    def shard_samples(self) -> int:
        """Samples that a stored chunk has room for."""
        return self.specs[0].chunk[0]

    @property
    def payloads_per_chunk(self) -> int:
        return 1 if self.whole_chunks else self.shard_samples

    @property
    def info(self) -> SplitInfo:
        """The manifest's entry, for splits whose samples lie one after the other."""
        samples = self.specs[0].shape[0]

        return SplitInfo(
            samples=samples,
            shard_samples=self.shard_samples,
            chunks=-(-samples // self.shard_samples),
        )


class BuildLayout(Protocol):
    """What the builder asks of a layout; `warehouse.layouts.base.Layout` is the whole of one."""

    def split_sizes(self, plan: BuildPlan) -> dict[str, int]:
        """Samples of each split that has any."""

    def probe(self, plan: BuildPlan, count: int) -> Sequence[tuple[SplitPlan, Any]]:
        """The payloads, about `count`, whose cost is scaled up to that of the whole build."""

    def version_tables(
        self, plan: BuildPlan, results: Sequence[ChunkResult], store: Path
    ) -> VersionTables:
        """Write the Zarr metadata below `store` and return the tables of the version."""

    def summary_lines(self, summary: Mapping[str, Any]) -> Sequence[str]:
        """A summary as the few lines that a log shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """Everything that a version is made of except its decoded samples.

    Attributes
    ----------
    version, key
        Name of the version and the full digest that the name is cut from.
    recipe
        The content settings and source fingerprint that `key` is a digest of.
    thresholds
        Settings that decide whether a build is accepted, but change no content.
    toolchain
        Versions of the libraries that decide the encoded bytes.
    layout
        Writes the tables and metadata once every chunk is baked.
    found, kept
        Sources found, and those of them that are baked.
    rejected
        Lines of rejected.jsonl.
    summary, group_summaries
        Counts of the whole version and of each split.
    """

    version: str
    key: str
    recipe: dict[str, Any]
    thresholds: dict[str, Any] = field(default_factory=dict)
    toolchain: dict[str, str]
    layout: BuildLayout
    splits: tuple[SplitPlan, ...]
    class_names: tuple[str, ...] = ()
    found: int
    kept: int
    rejected: tuple[dict[str, Any], ...] = ()
    summary: dict[str, Any]
    group_summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def split_sizes(self) -> dict[str, int]:
        """Samples of each split that has any."""
        return self.layout.split_sizes(self)

    @property
    def samples(self) -> int:
        """What progress counts: samples, or stored chunks where a payload is a whole one."""
        return sum(len(split.payloads) for split in self.splits)


@dataclass(slots=True)
class ChunkResult:
    """What a finished chunk leaves in its marker.

    Attributes
    ----------
    digest
        Of the task: array layout and records.
    files
        Rows of files.parquet.
    samples
        Content digest of each sample, in stored order.
    trace
        The chunk's line of trace.jsonl.
    failures
        Samples that could not be made; the chunk is unfinished if there are any.
    facts
        What a `Block` reported.
    """

    digest: str
    files: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)
    failures: list[PictureError] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
