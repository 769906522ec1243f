"""Running the micro-jobs of a version being made: open its queue, recover lost jobs, claim and do
jobs.

Purpose: a job bakes one stored chunk with the builder's own task and marker; a killed job is done
  again and no other.
Used by: features.run_extraction, segmentation.prediction, utils.jobs.derive,
  utils.jobs.publish_jobs
Design notes: what a job computes does not depend on who ran it; the marker, not the queue, says
  what is done.
Assistant guidance: when extending: what is encoded or predicted is the caller's `load`; nothing
  here knows of models.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils.jobs.queue import JobQueue
from utils.log import get_log
from warehouse.errors import WarehouseError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.layouts.plan import Block, BuildPlan
from warehouse.write.bake import bake_chunk
from warehouse.write.publish import published, staging_folder
from warehouse.write.tasks import ChunkTask, plan_tasks, read_marker

__all__ = ["chunk_digest", "open_queue", "recover_jobs", "run_jobs"]

log = get_log(__name__)


def open_queue(plan: BuildPlan, work: Path) -> JobQueue:
    """The queue of a plan, made where there is none. work.

    The folder that holds a folder a version.
    """
    jobs = [
        (
            split.name,
            at,
            min(split.shard_samples, split.specs[0].shape[0] - at * split.shard_samples),
        )
        for split in plan.splits
        for at in range(len(split.payloads))
    ]
    return JobQueue(work / plan.version / "jobs.db", jobs)


def recover_jobs(plan: BuildPlan, queue: JobQueue, root: Path) -> int:
    """Open again what the queue calls done and `root` does not hold, as after a deleted folder or
    for another root; how many.
    """
    with durable.lock(queue.path.with_name("publish.lock"), wait_s=600):
        if published(root, plan.version) is not None:
            return 0
        staging = staging_folder(root, plan.version)
        lost = [
            row["id"]
            for row, task in zip(queue.rows(), plan_tasks(plan), strict=True)
            if row["state"] == "done" and not (staging / task.marker).is_file()
        ]
        for job in lost:
            queue.reopen(job, f"its stored chunk is not under {root}")
    if lost:
        log.warning(
            "%d jobs were done before, but %s does not hold them: they are done again",
            len(lost),
            root,
        )
    return len(lost)


def run_jobs(
    plan: BuildPlan,
    load: Callable[[Any], Block],
    queue: JobQueue,
    root: Path,
    *,
    limit: int | None = None,
    progress: Callable[..., None] | None = None,
) -> int:
    """Claim and do jobs until none is free or `limit` are done; how many were done.

    What a job raises is written down, then raised.
    """
    tasks, staging = list(plan_tasks(plan)), staging_folder(root, plan.version)
    count = 0
    while limit is None or count < limit:
        job = queue.claim()
        if job is None:
            break
        try:
            seconds, digest = _do(tasks[job.id], load, staging)
        except KeyboardInterrupt:
            queue.release(job)
            raise
        except WarehouseError as error:
            queue.fail(job, str(error))
            raise
        queue.finish(job, seconds, digest)
        count += 1
        if progress is not None:
            progress(1, left=queue.left())
    return count


def _do(task: ChunkTask, load: Callable[[Any], Block], staging: Path) -> tuple[float, str]:
    start = time.monotonic()
    result = read_marker(task, staging)  # a process killed after its marker did all of it
    if result is None:
        result = bake_chunk(task, load=load, staging=staging)
    return round(time.monotonic() - start, 6), chunk_digest(result.files)


def chunk_digest(files: Sequence[dict[str, Any]]) -> str:
    """sha256 of a job's files: paths and their sha256."""
    return hashlib.sha256(
        tables.canonical([[row["path"], row["sha256"]] for row in files])
    ).hexdigest()
