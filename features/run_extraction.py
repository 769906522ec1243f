"""Extracting features: plan, do the jobs that are left, publish when all of them are done."""

from __future__ import annotations

from pathlib import Path

from features.encoders.network import NetworkEncoder
from features.export import export_npz, export_queue
from features.jobs import FeatureLoader, plan_features
from features.settings import FeatureSettings
from utils.jobs.publish import publish_jobs
from utils.jobs.queue import JobQueue
from utils.jobs.run import open_queue, recover_jobs, run_jobs
from utils.log import get_log, progress
from warehouse.format.manifest import Manifest
from warehouse.read.version import Warehouse
from warehouse.write.bake import BuildPlan
from warehouse.write.publish import open_root, published

__all__ = ["extract_features"]

log = get_log(__name__)


def extract_features(
    source: Warehouse, encoder: NetworkEncoder, settings: FeatureSettings
) -> dict[str, object]:
    """Do at most `settings.jobs` jobs, and publish the version once no job is left.

    Returns
    -------
    dict
        The result of `extract_features`; `path` and `digest` are None while jobs are left.
    """
    plan, load = plan_features(source, encoder, settings)
    root = Path(settings.output_root)
    open_root(root)
    with open_queue(plan, Path(settings.work)) as queue:
        manifest, done, left = _do_jobs(plan, load, queue, settings, encoder.name)
        total = len(queue.rows())
        export_queue(queue, source, plan.version, settings.job_size)

    folder = root / plan.version
    if manifest is None:
        log.info("%d of %d jobs are left; next: run the same command again", left, total)
    else:
        log.info("finished: %d jobs checked and published as %s", total, plan.version)
        if settings.export_npz:
            export_npz(Warehouse.open(folder), queue.path.parent)
        log.info("next: python -m scripts.train_head --head.features %s", root)
    return {
        "version": plan.version,
        "path": None if manifest is None else str(folder),
        "digest": None if manifest is None else manifest.digest,
        "jobs_done": total - left,
        "jobs_now": done,
        "jobs_left": left,
        "queue": str(queue.path),
        "random": encoder.random,
    }


def _do_jobs(
    plan: BuildPlan, load: FeatureLoader, queue: JobQueue, settings: FeatureSettings, encoder: str
) -> tuple[Manifest | None, int, int]:
    """The manifest where the version is published, jobs done now, and jobs left."""
    root = Path(settings.output_root)
    manifest = published(root, plan.version)
    if manifest is not None:
        log.info("%s exists already", plan.version)
        return manifest, 0, 0
    recover_jobs(plan, queue, root)
    left = queue.left()
    with progress(min(left, settings.jobs or left), "jobs", f"encoding with {encoder}") as bar:
        done = run_jobs(plan, load, queue, root, limit=settings.jobs, progress=bar.advance)
    if not queue.left():
        manifest = publish_jobs(plan, load, queue, root)
    # A damaged chunk opens its job again while it is being published.
    return manifest, done, queue.left()
