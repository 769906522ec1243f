"""Publishing what micro-jobs have made, once every job is done.

Purpose: every stored chunk is checked against the marker its queue knows before the version is
  published.
Used by: utils.jobs.derive
Design notes: of several processes that come at once one publishes and the others wait for it.
Assistant guidance: when extending: a damaged chunk opens its job again; nothing is published with a
  hole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.jobs.queue import JobQueue
from utils.jobs.run import chunk_digest
from utils.log import get_log
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.manifest import Manifest
from warehouse.layouts.plan import Block, BuildPlan
from warehouse.write.publish import bake, published, staging_folder
from warehouse.write.tasks import ChunkTask, plan_tasks, read_marker

__all__ = ["publish_jobs"]

log = get_log(__name__)


def publish_jobs(
    plan: BuildPlan, load: Callable[[Any], Block], queue: JobQueue, root: Path
) -> Manifest | None:
    """Check every chunk of a finished queue and publish; None when a chunk was damaged: its job is
    open again.

    Of several processes that come at once one publishes and the others wait for it.
    """
    with durable.lock(queue.path.with_name("publish.lock"), wait_s=600):
        manifest = published(root, plan.version)
        if manifest is not None:
            return manifest
        staging = staging_folder(root, plan.version)
        bad = [
            row["id"]
            for row, task in zip(queue.rows(), plan_tasks(plan), strict=True)
            if not _whole(task, row["digest"], staging)
        ]
        for job in bad:
            queue.reopen(job, "its stored chunk was changed or lost")
        if bad:
            log.warning("%d finished jobs were damaged and are open again", len(bad))
            return None
        return bake(lambda _: plan, lambda _: load, root, trace=True)


def _whole(task: ChunkTask, digest: str, staging: Path) -> bool:
    """Whether a job's marker is the one its queue knows and its files still have their sha256.

    Drops the marker otherwise.
    """
    result = read_marker(task, staging)
    known = result is not None and chunk_digest(result.files) == digest
    if (
        result is not None
        and known
        and all(tables.sha256_file(staging / row["path"]) == row["sha256"] for row in result.files)
    ):
        return True
    (staging / task.marker).unlink(missing_ok=True)
    return False
