"""Cut the plan of a build into tasks, one for each stored chunk, and find those that are done.

A task is what travels to a worker. Its marker, a small JSON file in the staging folder, makes a
build resumable. Invariant: a marker exists only after the files of its chunk are durable, and it
names the exact records that they were made from, so that a chunk is reused only where baking it
again would give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.schema import ArraySpec
from warehouse.layouts.plan import BuildPlan, ChunkResult

__all__ = ["DONE", "ChunkTask", "plan_tasks", "read_marker", "write_marker"]

DONE = "done"
"""The folder of the markers, below the staging folder."""


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """One stored chunk of every array of a split.

    Attributes
    ----------
    split
        The name of the split.
    chunk
        The number of the stored chunk.
    specs
        The arrays of the split.
    payloads
        What `load` is called with, in stored order.
    digest
        A sha256 over the layout of the arrays and the records of the chunk.
    """

    split: str
    chunk: int
    specs: tuple[ArraySpec, ...]
    payloads: tuple[object, ...]
    digest: str

    @property
    def marker(self) -> str:
        """The path of the marker below the staging folder."""
        return f"{DONE}/{self.split}-{self.chunk}.json"


def plan_tasks(plan: BuildPlan) -> Iterator[ChunkTask]:
    """Yield a task for each stored chunk, split by split, in stored order."""
    for split in plan.splits:
        size = split.payloads_per_chunk

        # The length of the split is left out: when the last picture turns out unreadable, the
        # chunks before it stay valid. With it, 4 of 4 chunks were baked again instead of 1.
        layout = repr(
            [(spec.name, spec.dtype, spec.chunk, spec.inner, spec.codec) for spec in split.specs]
        )

        for chunk in range(-(-len(split.payloads) // size)):
            part = slice(chunk * size, (chunk + 1) * size)
            # Boxes and labels count too: a class id shifts when the only picture of another class
            # is left out, and chunks that covered pictures alone kept the old ids.
            text = tables.canonical(
                [plan.key, layout, list(split.rows[part]), list(split.digests[part])]
            )
            yield ChunkTask(
                split=split.name,
                chunk=chunk,
                specs=split.specs,
                payloads=split.payloads[part],
                digest=hashlib.sha256(text).hexdigest(),
            )


def read_marker(task: ChunkTask, staging: Path) -> ChunkResult | None:
    """Return the result of an earlier run, or None if the chunk has to be baked.

    Parameters
    ----------
    task
        The chunk.
    staging
        The folder that the version is made in.

    Returns
    -------
    ChunkResult or None
        None if there is no marker, if it is damaged or of other records, or if a file of the chunk
        is missing or has another size.
    """
    try:
        data = json.loads((staging / task.marker).read_bytes())
        result = ChunkResult(
            data["digest"], data["files"], data["samples"], data["trace"], facts=data["facts"]
        )
        if result.digest != task.digest:
            return None

        # Sizes are enough, without hashes: a file gets its name only after it was written whole and
        # synced, so that what can differ is a file that someone cut or replaced.
        for file in result.files:
            if (staging / file["path"]).stat().st_size != file["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with a marker, the answer is the same: bake the chunk again.
        return None

    return result


def write_marker(task: ChunkTask, result: ChunkResult, staging: Path) -> None:
    """Write the marker of a chunk whose files are durable."""
    marker = {
        "digest": result.digest,
        "files": result.files,
        "samples": result.samples,
        "trace": result.trace,
        "facts": result.facts,
    }
    durable.write_bytes(staging / task.marker, json.dumps(marker).encode())
