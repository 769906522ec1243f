"""What `build_zarr` does beside baking: how many workers, and a dry run.

A dry run plans as a build would and bakes one sample, so that its estimate of bytes and minutes
comes from the user's own data and machine.
"""

from __future__ import annotations

import logging
import os

from ingest.jobs import Job
from warehouse.inspect.report import rejected_lines
from warehouse.settings import BuildSettings
from warehouse.write.estimate import estimate

__all__ = ["dry_run", "worker_count"]

log = logging.getLogger(__name__)


def worker_count(build: BuildSettings) -> int:
    """The workers that were asked for, or one for each core that this process may use."""
    if build.workers is not None:
        return build.workers
    # The affinity mask, which containers and job schedulers set, exists on Linux only.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def dry_run(job: Job, build: BuildSettings) -> dict[str, object]:
    """Log what a build would find, refuse and write.

    Returns
    -------
    dict
        The result of `build_zarr` without path and digest, and with the estimated `bytes`.
    """
    plan = job.plan({})
    for line in (*plan.layout.summary_lines(plan.summary), *rejected_lines(plan.rejected)):
        log.info("%s", line)
    guess = estimate(plan, job.loader(plan), workers=max(1, worker_count(build)))
    log.info(
        "dry run: would write %s, about %.1f MB in %.1f minutes; nothing was written",
        plan.version,
        guess.bytes / 1e6,
        guess.seconds / 60,
    )
    return {
        "version": plan.version,
        "path": None,
        "found": plan.found,
        "kept": plan.kept,
        "rejected": plan.found - plan.kept,
        "splits": plan.split_sizes,
        "digest": None,
        "seconds": round(guess.seconds, 1),
        "bytes": guess.bytes,
    }
