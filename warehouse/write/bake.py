"""Bake the stored chunks of a plan: one task writes one stored chunk of every array of a split.

The builder knows samples only as payloads for a `load` function that returns their arrays; where
they come from is the business of the caller. Invariant: a file appears under its name only when it
is whole and durable, and the marker of a chunk only after all of its files. A picture that fails
while it is baked sends the whole plan back to the caller, once, with every failure known. What was
given up: chunks of one version are never shared with another. Memory: a worker holds one sample and
the small arrays of the chunk; the parent holds a marker a chunk.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from warehouse.write.tasks import ChunkTask, plan_tasks, read_marker, write_marker

__all__ = ["bake_chunk", "bake_chunks", "content_digest", "write_error"]

STEPS = ("read", "decode", "letterbox", "encode", "write")
"""The phases of a chunk whose seconds are in its trace, whether or not `load` names them."""


def bake_chunks(
    plan: BuildPlan,
    load: LoadSample,
    staging: Path,
    *,
    run_all: RunAll = run_here,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[ChunkResult], list[PictureError]]:
    """Write every chunk of the plan that has no valid marker yet.

    Parameters
    ----------
    plan
        What to bake.
    load
        Makes the arrays of a payload.
    staging
        The folder that the version is made in.
    run_all
        Where the tasks run, of `warehouse.write.cluster`.
    progress
        Called with the number of payloads of each chunk that is done.

    Returns
    -------
    tuple
        The results of the chunks in the order of the plan, and the pictures that failed.

    Raises
    ------
    SpaceError
        If the disk is full.
    BuildError
        If a file cannot be written, a worker died, or a sample does not fit the layout.
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

    # Tasks end in any order. Tables and digests are made from the order of the plan, so that any
    # number of workers gives the same bytes.
    keys = [(task.split, task.chunk) for task in plan_tasks(plan)]
    return [results[key] for key in keys if key in results], failures


def bake_chunk(task: ChunkTask, *, load: LoadSample, staging: Path) -> ChunkResult:
    """Load the samples of a task one by one and write its files, durably, then its marker.

    Parameters
    ----------
    task
        The stored chunk to bake.
    load
        Makes the arrays of a payload.
    staging
        The folder that the version is made in.

    Returns
    -------
    ChunkResult
        With `failures` if a sample could not be made; nothing is written then.

    Raises
    ------
    SpaceError
        If the disk is full.
    BuildError
        If a file cannot be written, or a sample does not fit the layout.
    """
    result = ChunkResult(task.digest)
    seconds = dict.fromkeys(STEPS, 0.0)
    start = time.perf_counter()

    try:
        small = _write_shards(task, load, staging, result, seconds)

        at = time.perf_counter()
        _write_small_arrays(task, small, staging, result)
        # A file's name is durable only with its folder, and the marker must not be there before it.
        for folder in {(staging / row["path"]).parent for row in result.files}:
            durable.fsync_folder(folder)
        seconds["write"] += time.perf_counter() - at
    except _AbandonedError:
        return result
    except OSError as error:
        raise write_error(error, staging) from None

    result.trace = {
        "split": task.split,
        "chunk": task.chunk,
        "samples": len(result.samples),
        "bytes": sum(row["size"] for row in result.files),
        **{step: round(value, 6) for step, value in seconds.items()},
        "seconds": round(time.perf_counter() - start, 6),
    }
    write_marker(task, result, staging)

    return result


class _OpenShard(NamedTuple):
    """A file of a sharded array that is being written."""

    spec: ArraySpec
    file: durable.DurableFile
    writer: ShardWriter


def _write_shards(
    task: ChunkTask,
    load: LoadSample,
    staging: Path,
    result: ChunkResult,
    seconds: dict[str, float],
) -> dict[str, list[NDArray[Any]]]:
    """Write the files of the sharded arrays, and return the rows of the other arrays.

    Files, digests and failures go to the result. Raises _AbandonedError if a sample failed.
    """
    # A plain array is one compressed block, so that its rows are kept until all of them are there.
    small: dict[str, list[NDArray[Any]]] = {
        spec.name: [] for spec in task.specs if spec.inner is None
    }

    with ExitStack() as files:
        shards = []
        for spec in task.specs:
            if spec.inner:
                file = files.enter_context(durable.durable(staging / _path(task, spec)))
                shards.append(_OpenShard(spec, file, ShardWriter(file, spec.chunk[0] * spec.parts)))

        for position, arrays in _samples(task, load, result, seconds):
            result.samples.append(content_digest(task.specs, arrays))
            for shard in shards:
                _append(shard, position, arrays[shard.spec.name], seconds)
            for name, rows in small.items():
                rows.append(np.asarray(arrays[name]))

        # Only now, and not at the first failure: one pass over the chunk finds all unreadable
        # pictures, so that the caller plans anew once instead of once a picture.
        if result.failures:
            raise _AbandonedError

        finishing = time.perf_counter()
        for shard in shards:
            seal = shard.writer.finish()
            result.files.append(_file_row(task, shard.spec, shard.file, seal))

    # Files are synced and renamed as the stack closes: that time is of writing.
    seconds["write"] += time.perf_counter() - finishing
    return small


def _append(
    shard: _OpenShard, position: int, array: NDArray[Any], seconds: dict[str, float]
) -> None:
    """Encode the inner chunks of a sample and append them to the file of its array."""
    spec = shard.spec

    start = time.perf_counter()
    encoded = [encode(part, spec.codec) for part in parts_of(array, spec)]
    encoded_at = time.perf_counter()
    for entry, part in enumerate(encoded, position * spec.parts):
        shard.writer.append(part, entry)

    seconds["encode"] += encoded_at - start
    seconds["write"] += time.perf_counter() - encoded_at


def _write_small_arrays(
    task: ChunkTask, rows: Mapping[str, list[NDArray[Any]]], staging: Path, result: ChunkResult
) -> None:
    """Write the files of the arrays that are not sharded."""
    for spec in task.specs:
        if spec.inner is None:
            data = encode(padded(rows[spec.name], spec), spec.codec)
            with durable.durable(staging / _path(task, spec)) as file:
                file.write(data)

            # The seal of a file without an index is its crc32c, which the codec puts at its end.
            seal = int.from_bytes(data[-4:], "little")
            result.files.append(_file_row(task, spec, file, seal))


def _samples(
    task: ChunkTask, load: LoadSample, result: ChunkResult, seconds: dict[str, float]
) -> Iterator[tuple[int, Mapping[str, NDArray[Any]]]]:
    """Yield (position in the chunk, arrays) of each sample that can be made.

    Failures, facts and seconds go to the result.
    """
    for position, payload in enumerate(task.payloads):
        try:
            loaded = load(payload)
        except PictureError as error:
            result.failures.append(error)
            continue

        if isinstance(loaded, Block):
            result.facts = loaded.facts
            yield from zip(loaded.slots, loaded.samples, strict=True)
            spent = loaded.seconds
        else:
            arrays, spent = loaded
            yield position, arrays

        for step, value in spent.items():
            seconds[step] = seconds.get(step, 0.0) + value


class _AbandonedError(Exception):
    """A sample failed: the files of the chunk are discarded, and its failures are reported."""


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
    """Return the sha256 of the decoded arrays of a sample, in the order of the layout.

    No codec and no chunking changes it, so that two versions of the same content have the same
    digests.

    Raises
    ------
    BuildError
        If an array has another shape or dtype than the layout.
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


def write_error(error: OSError, where: Path) -> WarehouseError:
    """Return the typed error for an OSError while writing: SpaceError for a full disk."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return SpaceError(
            "no space left while writing",
            where=where,
            found=error.strerror,
            remedy="free some space and run the same command again to resume the build",
        )

    return BuildError(
        "writing failed",
        where=error.filename or where,
        found=error.strerror or str(error),
        remedy="check the folder and run the same command again",
    )
