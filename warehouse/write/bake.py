"""Baking a plan into a published version: one Dask task writes one stored chunk, markers make it
resumable, a rename publishes.

The builder knows samples only as payloads for a `load` function that returns their arrays; where
they come from is the caller's. Invariant: a chunk's marker exists only after its files are durable,
and names the exact records it was made from; a version folder exists only when everything in it is
durable. A picture that fails while being baked sends the whole plan back to the caller, once, with
every failure known. Given up: chunks of one version are never shared with another. Memory: a worker
holds one sample and the files' small arrays; the parent a marker a chunk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import BuildError, PictureError, SpaceError, WarehouseError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import chunk_key, encode, padded, parts_of
from warehouse.format.schema import ArraySpec
from warehouse.format.shards import ShardWriter
from warehouse.layouts.plan import Block, BuildPlan, ChunkResult, LoadSample
from warehouse.write.cluster import RunAll, run_here

__all__ = [
    "DONE",
    "ChunkTask",
    "Estimate",
    "bake_chunk",
    "bake_chunks",
    "estimate",
    "plan_tasks",
    "read_marker",
]


STEPS = ("read", "decode", "letterbox", "encode", "write")
DONE = "done"


@dataclass(frozen=True, slots=True)
class ChunkTask:
    """One stored chunk of every array of a split.

    `digest` covers the arrays' layout and the records, in order.
    """

    split: str
    chunk: int
    specs: tuple[ArraySpec, ...]
    payloads: tuple[Any, ...]
    digest: str

    @property
    def marker(self) -> str:
        return f"{DONE}/{self.split}-{self.chunk}.json"


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build would write and take, from a few samples baked in memory."""

    samples: int
    bytes: int
    seconds: float


def plan_tasks(plan: BuildPlan) -> Iterator[ChunkTask]:
    for split in plan.splits:
        size = split.payloads_per_chunk
        # Without the split's length: leaving one picture out at the end leaves the chunks before it
        # valid.
        layout = repr(
            [(spec.name, spec.dtype, spec.chunk, spec.inner, spec.codec) for spec in split.specs]
        )
        for chunk in range(-(-len(split.payloads) // size)):
            part = slice(chunk * size, (chunk + 1) * size)
            text = tables.canonical(
                [plan.key, layout, list(split.rows[part]), list(split.digests[part])]
            )
            yield ChunkTask(
                split.name,
                chunk,
                split.specs,
                split.payloads[part],
                hashlib.sha256(text).hexdigest(),
            )


def bake_chunks(
    plan: BuildPlan,
    load: LoadSample,
    staging: Path,
    *,
    run_all: RunAll = run_here,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[ChunkResult], list[PictureError]]:
    """Write every chunk of the plan that has no valid marker yet. (results in plan order, pictures
    that failed).

    run_all: where tasks run, of warehouse.write.cluster. Raises SpaceError, BuildError.
    """
    results: dict[tuple[str, int], ChunkResult] = {}
    open_tasks: list[ChunkTask] = []
    for task in plan_tasks(plan):
        done = read_marker(task, staging)
        if done is None:
            open_tasks.append(task)
        else:
            results[task.split, task.chunk] = done
            if progress:
                progress(len(task.payloads))
    failures: list[PictureError] = []
    for task, result in run_all(partial(bake_chunk, load=load, staging=staging), open_tasks):
        results[task.split, task.chunk] = result
        failures += result.failures
        if progress:
            progress(len(task.payloads))
    return [
        results[task.split, task.chunk]
        for task in plan_tasks(plan)
        if (task.split, task.chunk) in results
    ], failures


def read_marker(task: ChunkTask, staging: Path) -> ChunkResult | None:
    """The result of an earlier run when its marker is of this very task and its files still have
    their sizes.
    """
    try:
        data = json.loads((staging / task.marker).read_bytes())
        result = ChunkResult(
            data["digest"], data["files"], data["samples"], data["trace"], facts=data["facts"]
        )
        if result.digest == task.digest and all(
            (staging / file["path"]).stat().st_size == file["size"] for file in result.files
        ):
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def bake_chunk(task: ChunkTask, *, load: LoadSample, staging: Path) -> ChunkResult:
    """Load the task's samples one by one and write its files, durably, then its marker.

    Runs in a worker.
    """
    result = ChunkResult(task.digest)
    seconds = dict.fromkeys(STEPS, 0.0)
    start = time.perf_counter()
    small: dict[str, list[NDArray[Any]]] = {
        spec.name: [] for spec in task.specs if spec.inner is None
    }
    try:
        with ExitStack() as stack:
            opened = [
                (spec, stack.enter_context(durable.durable(staging / _path(task, spec))))
                for spec in task.specs
                if spec.inner
            ]
            writers = [
                (spec, file, ShardWriter(file, spec.chunk[0] * spec.parts)) for spec, file in opened
            ]
            for slot, arrays in _samples(task, load, result, seconds):
                result.samples.append(content_digest(task.specs, arrays))
                for spec, _, writer in writers:
                    at = time.perf_counter()
                    encoded = [
                        encode(part, spec.codec) for part in parts_of(arrays[spec.name], spec)
                    ]
                    seconds["encode"] += time.perf_counter() - at
                    at = time.perf_counter()
                    for place, part in enumerate(encoded, slot * spec.parts):
                        writer.append(part, place)
                    seconds["write"] += time.perf_counter() - at
                for name, rows in small.items():
                    rows.append(np.asarray(arrays[name]))
            if result.failures:
                raise _Abandoned
            at = time.perf_counter()
            for spec, file, writer in writers:
                seal = writer.finish()
                result.files.append(_file_row(task, spec, file, seal))
        for spec in task.specs:
            if spec.inner is None:
                data = encode(padded(small[spec.name], spec), spec.codec)
                with durable.durable(staging / _path(task, spec)) as file:
                    file.write(data)
                result.files.append(
                    _file_row(task, spec, file, int.from_bytes(data[-4:], "little"))
                )
        for folder in {(staging / row["path"]).parent for row in result.files}:
            durable.fsync_folder(folder)
    except _Abandoned:
        return result
    except OSError as error:
        raise write_error(error, staging) from None
    seconds["write"] += time.perf_counter() - at
    total = time.perf_counter() - start
    result.trace = {
        "split": task.split,
        "chunk": task.chunk,
        "samples": len(result.samples),
        "bytes": sum(row["size"] for row in result.files),
    }
    result.trace |= {step: round(value, 6) for step, value in seconds.items()} | {
        "seconds": round(total, 6)
    }
    marker = {
        "digest": result.digest,
        "files": result.files,
        "samples": result.samples,
        "trace": result.trace,
        "facts": result.facts,
    }
    durable.write_bytes(staging / task.marker, json.dumps(marker).encode())
    return result


def _samples(
    task: ChunkTask, load: LoadSample, result: ChunkResult, seconds: dict[str, float]
) -> Iterator[tuple[int, Mapping[str, NDArray[Any]]]]:
    """(slot, arrays) of each sample that can be made.

    Failures, facts and seconds go to the result.
    """
    for slot, payload in enumerate(task.payloads):
        try:
            loaded = load(payload)
        except PictureError as error:
            result.failures.append(error)
            continue
        if isinstance(loaded, Block):
            result.facts = loaded.facts
            yield from zip(loaded.slots, loaded.samples, strict=True)
        else:
            yield slot, loaded[0]
        for step, value in (loaded.seconds if isinstance(loaded, Block) else loaded[1]).items():
            seconds[step] = seconds.get(step, 0.0) + value


class _Abandoned(Exception):
    """A sample failed: the chunk's files are discarded, its failures reported."""


def _path(task: ChunkTask, spec: ArraySpec) -> str:
    return f"{tables.STORE}/{task.split}/{spec.name}/{chunk_key(spec, task.chunk)}"


def _file_row(
    task: ChunkTask, spec: ArraySpec, file: durable.DurableFile, seal: int
) -> dict[str, Any]:
    array = f"{task.split}/{spec.name}"
    return {
        "path": _path(task, spec),
        "size": file.size,
        "sha256": file.hash.hexdigest(),
        "array": array,
        "chunk": task.chunk,
        "seal": seal,
    }


def content_digest(specs: Sequence[ArraySpec], arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 of a sample's decoded arrays, in layout order: no codec and no chunking changes it.

    Raises BuildError on a wrong shape.
    """
    digest = hashlib.sha256()
    for spec in specs:
        array = arrays[spec.name]
        if array.shape != spec.shape[1:] or array.dtype != np.dtype(spec.dtype):
            raise BuildError(
                f"a sample's {spec.name} does not fit the layout",
                expected=(spec.shape[1:], spec.dtype),
                found=(array.shape, str(array.dtype)),
            )
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def estimate(plan: BuildPlan, load: LoadSample, *, workers: int, probe: int = 8) -> Estimate:
    """Bake a few samples in memory and scale up."""
    taken = plan.layout.probe(plan, probe)
    start, size = time.perf_counter(), 0
    for split, payload in taken:
        try:
            loaded = load(payload)
        except PictureError:
            continue
        for arrays in loaded.samples if isinstance(loaded, Block) else [loaded[0]]:
            size += sum(
                len(encode(part, spec.codec))
                for spec in split.specs
                for part in parts_of(arrays[spec.name], spec)
            )
            content_digest(split.specs, arrays)
    share = plan.samples / max(1, len(taken))
    return Estimate(
        plan.samples, int(size * share), (time.perf_counter() - start) * share / max(1, workers)
    )


def write_error(error: OSError, where: Path) -> WarehouseError:
    """An OSError while writing as a typed error."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return SpaceError(
            "no space left while writing",
            where=where,
            found=error.strerror,
            remedy="free some space and run the same command again: it goes on",
        )
    return BuildError(
        "writing failed",
        where=error.filename or where,
        found=error.strerror or str(error),
        remedy="check the folder and run the same command again",
    )
