"""Making a derived version in jobs: do what is left, and publish once nothing is left.

Purpose: `derive_version`, the one way from a plan and its `load` to a published version for
  features and probabilities, which several commands may make together.
Used by: features.run_extraction, segmentation.prediction
Design notes: the caller opens the queue, since it may report on it afterwards. What is baked in one
  go instead of in jobs goes through utils.jobs.bake_version.
Assistant guidance: when extending: each step takes any state that a killed process may have left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.jobs.publish_jobs import publish_jobs
from utils.jobs.queue import JobQueue
from utils.jobs.run import recover_jobs, run_jobs
from utils.log import get_log, progress
from warehouse.format.manifest import Manifest
from warehouse.layouts.plan import Block, BuildPlan
from warehouse.write.publish import published

__all__ = ["Derived", "derive_version"]

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class Derived:
    """Where a version stands after a command worked on it.

    Attributes
    ----------
    manifest
        Of the published version; None while jobs are left.
    done, left
        Number of jobs that this command did, and that are not done yet.
    """

    manifest: Manifest | None
    done: int
    left: int


def derive_version(
    plan: BuildPlan,
    load: Callable[[Any], Block],
    queue: JobQueue,
    root: Path,
    *,
    verb: str,
    limit: int | None = None,
) -> Derived:
    """Do the jobs of a plan and publish its version below `root` when all of them are done.

    Parameters
    ----------
    load
        Makes the samples of one stored chunk from its payload.
    queue
        Of this plan; other processes may take jobs from it at the same time.
    verb
        What a job does, for the progress bar.
    limit
        Number of jobs to do at most; None does all.
    """
    manifest = published(root, plan.version)
    if manifest is not None:
        log.info("%s exists already", plan.version)
        return Derived(manifest, 0, 0)

    recover_jobs(plan, queue, root)
    left = queue.left()
    with progress(min(left, limit or left), "jobs", verb) as bar:
        done = run_jobs(plan, load, queue, root, limit=limit, progress=bar.advance)
    if not queue.left():
        manifest = publish_jobs(plan, load, queue, root)
    # Asked again: a chunk that is found damaged while it is being published opens its job.
    return Derived(manifest, done, queue.left())
